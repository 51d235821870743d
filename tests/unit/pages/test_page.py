from pathlib import Path

from megatron_medllm.pages.numbers import difference, passed_text, rate, signed
from megatron_medllm.pages.page import Link, run_links
from megatron_medllm.pages.plan import write_plan_page


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


def test_a_plan_page_says_what_fits_and_why(tmp_path: Path) -> None:
    values = {
        "hardware": "h100-sxm",
        "layout": {"tp": 8, "sp": True, "first_stage_layers": None},
        "fits": False,
        "memory_bytes": {"0": {"weights": 10 * 2**30}, "1": {"weights": 70 * 2**30, "activations": 20 * 2**30}},
        "memory_limit_bytes": 80 * 2**30,
        "step_time_s": 4.25,
        "step_parts_s": {"matrix products": 4.0, "bubble": 0.0, "optimizer": 0.25},
        "tokens_per_s_per_gpu": 1234.5,
        "mfu_causal": 0.431,
        "training_time_s": None,
        "assumptions": ["bf16 & more"],
    }
    write_plan_page(tmp_path / "plan-cpt.html", "cpt", values)
    page = (tmp_path / "plan-cpt.html").read_text()
    assert "Does NOT fit: 90.00 of 80.00 GiB" in page and "pipeline stage 1" in page
    assert "70.00 GiB" in page and "4.2 s a step, 1,234 tokens/s/GPU, MFU 43.1 %" in page
    assert "bubble" not in page and "bf16 &amp; more" in page and "first stage layers" not in page
