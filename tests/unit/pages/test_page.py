from pathlib import Path

from megatron_medllm.pages.numbers import difference, passed_text, rate, signed
from megatron_medllm.pages.page import Link, run_links


def test_links_lead_to_the_other_pages_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("corpus/medical/summary.html", "eval/cpt/report.html", "pairs/report.html", "bench/throughput.html"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    (run / "run.yaml").touch()
    assert run_links(run / "eval" / "cpt" / "report.html") == [
        Link("Run report", "../../report.html"),
        Link("Corpus: medical", "../../corpus/medical/summary.html"),
        Link("Preference pairs", "../../pairs/report.html"),
        Link("Benchmark: throughput", "../../bench/throughput.html"),
    ]
    assert run_links(run / "report.html")[1] == Link("Preference pairs", "pairs/report.html")


def test_a_page_outside_of_a_run_has_no_links(tmp_path: Path) -> None:
    assert run_links(tmp_path / "eval" / "report.html") == []


def test_numbers_are_written_alike_everywhere() -> None:
    assert [rate(0.5), rate(None), signed(-0.0504), signed(None)] == ["0.500", "–", "−0.050", "–"]
    assert difference({"estimate": -0.1, "low": -0.2, "high": 0.0}) == "−0.100 [−0.200, +0.000]"
    assert [passed_text(value) for value in (True, False, None)] == ["pass", "fail", "–"]
