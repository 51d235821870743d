import xml.etree.ElementTree as ElementTree

from megatron_medllm.pages.intervals import Dot, IntervalChart


def test_dots_stand_on_the_scale() -> None:
    """The plot is 626 wide from 250: 0.5 on a scale of 0..1 is at 563, and what lies outside is at the end."""
    rows = [("循環器 <&>", [Dot("answer only", 0.5, 0.25, 2.0)]), ("神経", [Dot("explained", 0.0, 0.0, 0.1)])]
    chart = IntervalChart("accuracy", rows)
    drawn = ElementTree.fromstring(chart.svg)
    dots = drawn.findall("circle")
    assert [dot.get("cx") for dot in dots] == ["563.0", "250.0"]
    assert [dot.find("title").text for dot in dots] == [
        "循環器 <&> answer only: 0.500 [0.250, 2.000]",
        "神経 explained: 0.000 [0.000, 0.100]",
    ]
    intervals = [line for line in drawn.findall("line") if line.get("class") == "interval"]
    assert (intervals[0].get("x1"), intervals[0].get("x2")) == ("406.5", "876.0")
    assert [dot.get("fill") for dot in dots] == ["var(--blue)", "var(--orange)"]
    assert chart.series == [("answer only", "var(--blue)"), ("explained", "var(--orange)")]


def test_signed_scale_marks_zero() -> None:
    chart = IntervalChart("gap", [("x", [Dot("gap", -0.1, -0.2, 0.0)])], lower=-0.2, upper=0.2, signed=True)
    drawn = ElementTree.fromstring(chart.svg)
    assert [line.get("x1") for line in drawn.findall("line") if line.get("class") == "zero"] == ["563.0"]
    assert [text.text for text in drawn.findall("text")][:5] == ["−0.20", "−0.10", "+0.00", "+0.10", "+0.20"]


def test_chance_is_marked_and_dots_of_a_row_do_not_overlap() -> None:
    rows = [("CPT & RPO", [Dot("a", 0.5, 0.25, 1.0), Dot("b", 0.5, 0.4, 0.6)])]
    drawn = ElementTree.fromstring(IntervalChart("accuracy", rows, chance=0.2).svg)
    assert [line.get("x1") for line in drawn.findall("line") if line.get("class") == "chance"] == ["375.2"]
    first, second = (float(dot.get("cy")) for dot in drawn.findall("circle"))
    assert second - first == 14
    assert "CPT & RPO" in [text.text for text in drawn.findall("text")]
