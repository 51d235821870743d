import xml.etree.ElementTree as ElementTree

from megatron_medllm.evaluation.charts import Dot, interval_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_dots_stand_on_the_scale() -> None:
    """The plot is 430 wide from 150: 0.5 on a scale of 0..1 is at 365, and what lies outside is at the end."""
    rows = [("循環器 <&>", [Dot("answer only", 0.5, 0.25, 2.0)]), ("神経", [Dot("explained", 0.0, 0.0, 0.1)])]
    chart = drawn(interval_chart(rows, lower=0.0, upper=1.0))
    dots = [c for c in chart.iter(f"{SVG}circle") if c.get("r") == "4"]
    assert [dot.get("cx") for dot in dots] == ["365.0", "150.0"]
    assert [dot.find(f"{SVG}title").text for dot in dots] == [
        "循環器 <&> answer only: 0.500 [0.250, 2.000]",
        "神経 explained: 0.000 [0.000, 0.100]",
    ]
    intervals = [line for line in chart.iter(f"{SVG}line") if line.get("stroke-width") == "2"]
    assert (intervals[0].get("x1"), intervals[0].get("x2")) == ("257.5", "580.0")
    assert len({dot.get("fill") for dot in dots}) == 2


def test_signed_scale_marks_zero() -> None:
    chart = drawn(interval_chart([("x", [Dot("gap", -0.1, -0.2, 0.0)])], lower=-0.2, upper=0.2, signed=True))
    assert [line.get("x1") for line in chart.iter(f"{SVG}line") if line.get("stroke") == "#888"] == ["365.0"]
    assert [t.text for t in chart.iter(f"{SVG}text")][1:6] == ["-0.20", "-0.10", "+0.00", "+0.10", "+0.20"]
