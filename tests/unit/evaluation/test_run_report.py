"""Run directories written by hand, so that every number, verdict and omission of the report is known beforehand."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, PromptConfig
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run import run_exam
from megatron_medllm.evaluation.run_report import build_report, table
from megatron_medllm.evaluation.run_report.numbers import chance_accuracy
from megatron_medllm.evaluation.run_report.training import training_charts
from megatron_medllm.evaluation.run_report.words import model_label
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.pages.curves import Line, line_chart, smoothed, smoothing_window, thinned
from megatron_medllm.pages.numbers import seconds_text
from megatron_medllm.storage import read_json, write_json, write_jsonl
from tests.worlds.exam import ScriptedEndpoint


def first_right(right: int, *, of: int) -> list[bool]:
    return [i < right for i in range(of)]


def write_eval(
    run_dir: Path, name: str, *, answer_only: Sequence[bool], explained: Sequence[bool], samples: int = 1
) -> None:
    """An evaluation as `run_exam` leaves it, as far as the report reads it. Later samples are all wrong."""
    rows = [
        {
            "problem_id": f"q{i}",
            "mode": mode,
            "sample": sample,
            "group": f"q{i}",
            "prompt": f"問題:問い{i}\n答え:",
            "output": f"{name}の考え{i} <script>alert(1)</script>\n答え:a",
            "parsed": ["a"] if i else None,
            "malformed_reason": "" if i else "no answer",
            "gold": [["a"]],
            "correct": right and sample == 0,
            "points": int(right and sample == 0),
            "possible": 1,
        }
        for mode, verdicts in (("answer_only", answer_only), ("explained", explained))
        for i, right in enumerate(verdicts)
        for sample in range(samples)
    ]
    config = EvalConfig(exam=ExamConfig(name="invented", data=(run_dir / "world" / "exam",)), resamples=2000)
    write_jsonl(run_dir / "eval" / name / "results.jsonl", rows)
    write_json(
        run_dir / "eval" / name / "summary.json",
        {"exam": "invented", "questions": len(answer_only), "config": config.model_dump(mode="json")},
    )


def write_questions(run_dir: Path, count: int) -> None:
    row = {"choices": ["ア", "イ", "ウ", "エ", "オ"], "answer": ["a"], "points": "1"}
    rows = [{"problem_id": f"q{i}", "problem_text": f"問い{i}はどれか。", **row} for i in range(count)]
    write_jsonl(run_dir / "world" / "exam" / "questions.jsonl", rows)


def page_of(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def published_pattern(tmp_path: Path) -> Path:
    """Base and CPT lose when they explain, RPO does not, and its short answers stay."""
    write_eval(tmp_path, "base", answer_only=first_right(40, of=100), explained=first_right(20, of=100))
    write_eval(tmp_path, "cpt", answer_only=first_right(80, of=100), explained=first_right(50, of=100))
    write_eval(tmp_path, "rpo", answer_only=first_right(80, of=100), explained=first_right(79, of=100))
    return tmp_path


def test_table_of_the_paper(published_pattern: Path) -> None:
    summary = build_report(published_pattern)
    assert summary == read_json(published_pattern / "summary.json")
    assert list(summary["models"]) == ["base", "cpt", "rpo"]
    cpt = summary["models"]["cpt"]
    assert (cpt["answer_only"]["accuracy"], cpt["explained"]["accuracy"], cpt["answer_only"]["n"]) == (0.8, 0.5, 100)
    # Wilson's interval of 80/100 and of 50/100, as published tables have them.
    assert cpt["answer_only"]["ci95"] == pytest.approx([0.7112, 0.8666], abs=1e-4)
    assert cpt["explained"]["ci95"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert cpt["gap"] == pytest.approx(-0.3)
    # 30 of 100 questions flip: the bootstrap's interval is near -0.3 +- 1.96 * sqrt(.3 * .7 / 100).
    assert cpt["gap_ci95"] == pytest.approx([-0.39, -0.21], abs=0.02)
    assert (cpt["right_to_wrong"], cpt["wrong_to_right"], cpt["effect"]) == (30, 0, "loses")
    assert cpt["explained"]["malformed"] == 1
    assert summary["models"]["rpo"]["effect"] == "unclear"
    change = next(row for row in summary["differences"] if row["first"] == "cpt")
    assert change["explained"]["estimate"] == pytest.approx(0.29)
    assert change["gap"]["estimate"] == pytest.approx(0.29)
    assert change["answer_only"] == {"estimate": 0.0, "ci95": [0.0, 0.0]}


def test_effect_shows(published_pattern: Path) -> None:
    effect = build_report(published_pattern)["effect"]
    assert (effect["shows"], [check["holds"] for check in effect["checks"]]) == ("yes", [True] * 5)
    page = page_of(published_pattern)
    assert "The effect shows in this run." in page
    assert "CPT loses accuracy when it explains (0.800 answer only, 0.500 explained, gap −0.300 [−" in page
    assert "Explained, CPT + RPO is better than CPT: +0.290 [" in page


@pytest.mark.parametrize(
    ("name", "answer_only", "explained", "shows", "failing"),
    [
        ("base", 40, 40, "partly", "Base loses accuracy when it explains"),
        ("cpt", 80, 80, "no", "CPT loses accuracy when it explains"),
        ("rpo", 80, 50, "no", "Preference training narrows the gap of CPT"),
        ("rpo", 80, 65, "partly", "CPT + RPO shows no loss when it explains"),
        ("rpo", 50, 50, "partly", "CPT + RPO shows no loss in short answers against CPT"),
    ],
)
def test_effect_is_not_claimed_when_a_part_is_missing(
    published_pattern: Path, name: str, answer_only: int, explained: int, shows: str, failing: str
) -> None:
    verdicts = {"answer_only": first_right(answer_only, of=100), "explained": first_right(explained, of=100)}
    write_eval(published_pattern, name, **verdicts)
    effect = build_report(published_pattern)["effect"]
    assert effect["shows"] == shows
    assert failing in [check["claim"] for check in effect["checks"] if not check["holds"]]
    assert "The effect shows in this run." not in page_of(published_pattern)


def test_chance_is_said(tmp_path: Path) -> None:
    """Five choices, one right: 0.2 is chance, and a gap between two chance scores is not an effect."""
    write_questions(tmp_path, 100)
    for name in ("base", "cpt", "rpo"):
        write_eval(tmp_path, name, answer_only=first_right(26, of=100), explained=first_right(17, of=100))
    summary = build_report(tmp_path)
    assert (summary["chance"], summary["at_chance"], summary["effect"]["shows"]) == (
        pytest.approx(0.2),
        True,
        "unknown",
    )
    assert "Scores are chance: no model is above blind guessing (0.200)" in page_of(tmp_path)
    write_eval(tmp_path, "cpt", answer_only=first_right(60, of=100), explained=first_right(17, of=100))
    assert build_report(tmp_path)["at_chance"] is False
    assert "Scores are chance" not in page_of(tmp_path)


def test_chance_counts_the_sets_of_choices(exam_dir: Path) -> None:
    """Five questions ask for 1, 2, 1, 1 and 1 of 5 choices, one for a number: (4 * 1/5 + 1/10 + 0) / 6."""
    questions = load_exam("invented", [exam_dir]).questions
    assert chance_accuracy(questions, count_revealed=True) == pytest.approx((4 / 5 + 1 / 10) / 6)
    assert chance_accuracy(questions, count_revealed=False) == pytest.approx((5 / 31) / 6)


def test_seen_and_unseen_apart(published_pattern: Path) -> None:
    """q0..q49 are about entities of the training questions; of these CPT explains all 50 right, of the others none."""
    rows = [{"problem_id": f"q{i}", "seen_in_preference_training": i < 50} for i in range(100)]
    write_jsonl(published_pattern / "world" / "exam" / "questions_metadata.jsonl", rows)
    parts = build_report(published_pattern)["models"]["cpt"]["splits"]["seen_in_preference_training"]
    assert (parts["yes"]["explained"]["accuracy"], parts["yes"]["explained"]["n"], parts["yes"]["gap"]) == (
        1.0,
        50,
        0.0,
    )
    assert (parts["no"]["answer_only"]["accuracy"], parts["no"]["explained"]["accuracy"]) == (0.6, 0.0)
    assert parts["no"]["gap"] == pytest.approx(-0.6)
    assert "By entity in preference training" in page_of(published_pattern)


def test_same_numbers_as_the_evaluations_own_report(tmp_path: Path, exam_dir: Path) -> None:
    def script(body: dict) -> str:
        return "b" if not body["prompt"].endswith("考察:") else "aは誤り。\n答え: a"

    with ScriptedEndpoint(script) as endpoint:
        config = EvalConfig(
            exam=ExamConfig(name="invented", data=(exam_dir,)),
            prompt=PromptConfig(template="compact"),
            engine=EngineConfig(kind="openai", url=endpoint.url),
            decoding=DecodingConfig(),
            resamples=500,
        )
        own = run_exam(config, Path("scripted"), tmp_path / "eval" / "base")
    summary = build_report(tmp_path)
    numbers = summary["models"]["base"]
    for mode, row in own["modes"].items():
        interval = row["accuracy_interval"]
        assert numbers[mode]["accuracy"] == row["accuracy"]
        assert numbers[mode]["ci95"] == [interval["low"], interval["high"]]
        assert (numbers[mode]["malformed"], numbers[mode]["n"]) == (row["malformed"], 6)
    gap = own["gap"]["accuracy"]
    assert (numbers["gap"], numbers["gap_ci95"]) == (gap["estimate"], [gap["low"], gap["high"]])
    assert numbers["gap"] != 0
    assert summary["chance"] == pytest.approx(0.15)  # the questions are read from where the evaluation had them


def test_examples_show_every_kind_with_its_count(published_pattern: Path) -> None:
    """CPT explains q0..q49 right, RPO q0..q78: 29 mended, none broken, 21 wrong and 50 right both times."""
    write_questions(published_pattern, 100)
    build_report(published_pattern)
    page = page_of(published_pattern)
    for heading in (
        "Wrong, then right: 29 of 100",
        "Right, then wrong: 0 of 100",
        "Wrong both times: 21 of 100",
        "Right both times: 50 of 100",
    ):
        assert heading in page
    assert page.index("cptの考え50") < page.index("rpoの考え50") < page.index("cptの考え51")
    assert "問い50はどれか。" in page
    assert '<li class="key">a. ア</li>' in page
    assert "cptの考え53" not in page  # three of this kind are shown


def test_page_stands_alone_and_what_models_write_is_text(published_pattern: Path) -> None:
    build_report(published_pattern)
    page = page_of(published_pattern)
    assert "&lt;script&gt;alert(1)" in page
    assert not [mark for mark in ("<script", "<link", "http://", "https://", "@import", " src=") if mark in page]


def test_only_the_first_sample_counts(tmp_path: Path) -> None:
    write_eval(tmp_path, "cpt", answer_only=[True, True], explained=[True, False], samples=3)
    numbers = build_report(tmp_path)["models"]["cpt"]
    assert (numbers["answer_only"]["accuracy"], numbers["explained"]["accuracy"]) == (1.0, 0.5)
    assert numbers["answer_only"]["n"] == 2


def test_last_round_is_compared_with_the_start_and_the_controls(published_pattern: Path) -> None:
    verdicts = {"answer_only": first_right(80, of=100), "explained": first_right(80, of=100)}
    for name in ("rpo-2", "rpo-sft", "rpo-dpo"):
        write_eval(published_pattern, name, **verdicts)
    summary = build_report(published_pattern)
    assert [numbers["label"] for numbers in summary["models"].values()] == [
        "Base",
        "CPT",
        "CPT + RPO",
        "CPT + RPO, round 2",
        "SFT only (control)",
        "DPO only (control)",
    ]
    contests = [(row["first"], row["second"]) for row in summary["differences"]]
    assert contests == [("base", "cpt"), ("cpt", "rpo-2"), ("rpo-sft", "rpo-2"), ("rpo-dpo", "rpo-2")]
    assert "Explained, CPT + RPO, round 2 and SFT only (control) cannot be told apart" in page_of(published_pattern)
    assert summary["credit"].startswith("SFT on the same chosen answers cannot be told to be worse")
    assert summary["credit"] in page_of(published_pattern)
    write_eval(published_pattern, "rpo-sft", answer_only=first_right(80, of=100), explained=first_right(50, of=100))
    assert build_report(published_pattern)["credit"].endswith("the preference term earns credit.")
    assert model_label("rpo", ["base", "rpo"]) == "RPO"


def write_metrics(run_dir: Path, name: str, rows: list[dict]) -> None:
    write_jsonl(run_dir / name / "metrics.jsonl", [{"step": i, **row} for i, row in enumerate(rows, start=1)])


def preference_row(step: int, **changes: object) -> dict:
    row = {"loss": 2.0 - step / 10, "preference_loss": 0.7, "nll": 1.3, "margin": step, "accuracy": 0.5, "tokens": 100}
    row |= {"chosen_reward": 0.1 * step, "rejected_reward": -0.2 * step, "chosen_logprob": -20.0 + step}
    row |= {"rejected_logprob": -30.0 - step, "reference_chosen_logprob": -20.0, "reference_rejected_logprob": -30.0}
    return row | {"tokens_per_s": 1000.0 * step, "lr": 1e-4} | changes


def test_trainings_without_any_exam(tmp_path: Path) -> None:
    """A step whose loss was not finite is logged as null; a validation row has no loss of its own."""
    losses = [
        {"loss": 4.0 - 0.1 * i, "tokens": 1000, "tokens_per_s": 50.0, "lr": 1e-3, "skipped": 0.0} for i in range(20)
    ]
    losses[7]["loss"] = None
    losses[7]["skipped"] = 1.0
    write_metrics(tmp_path, "cpt", [*losses, {"step": 20, "validation_loss": 2.5}])
    write_metrics(tmp_path, "rpo", [preference_row(step) for step in range(3)])
    summary = build_report(tmp_path)
    facts = summary["trainings"]["cpt"]
    assert (facts["steps"], facts["tokens"], facts["first_loss"]) == (20, 20_000, 4.0)
    assert facts["last_loss"] == pytest.approx(2.1)
    assert (facts["validation_loss"], facts["skipped_steps"], facts["tokens_per_s"]) == (2.5, 1.0, 50.0)
    assert (summary["models"], summary["exam"], summary["effect"]["shows"]) == ({}, None, "unknown")
    page = page_of(tmp_path)
    titles = [f"<h3>{title}</h3>" for title in ("CPT: loss", "CPT + RPO: loss", "CPT + RPO: reward margin")]
    assert all(title in page for title in titles)
    assert "No finished evaluation in this run." in page


def test_validation_is_drawn_beside_training(tmp_path: Path) -> None:
    """Dots for every validation, step 0 included where its number means something."""
    names = ("loss", "accuracy", "chosen_reward", "rejected_reward")
    names += ("chosen_logprob_per_token", "rejected_logprob_per_token")
    held_out = [{"step": step, **{f"validation_{name}": 1.0 + (step - 4) ** 2 for name in names}} for step in (0, 3, 6)]
    per_token = {"chosen_logprob_per_token": -2.0, "rejected_logprob_per_token": -3.0}
    write_metrics(tmp_path, "rpo", [*(preference_row(step, **per_token) for step in range(6)), *held_out])
    facts = build_report(tmp_path)["trainings"]["rpo"]
    validated = [facts[f"{name}validation_loss"] for name in ("first_", "best_", "")]
    assert (validated, facts["best_validation_step"]) == ([17.0, 2.0, 5.0], 3)
    page = page_of(tmp_path)
    assert "2.000 (3)" in page
    dots = {
        title: page[page.index(f"<h3>RPO: {title}</h3>") :].split("</svg>")[0].count("<circle")
        for title in ("loss", "reward margin", "pairs ranked right", "log-probability per token")
    }
    assert dots == {"loss": 3, "reward margin": 3, "pairs ranked right": 2, "log-probability per token": 6}


def test_control_without_reference_has_no_margin_curve(tmp_path: Path) -> None:
    for name in ("rpo", "rpo-sft", "rpo-dpo"):
        write_metrics(tmp_path, name, [preference_row(step) for step in range(3)])
    build_report(tmp_path)
    page = page_of(tmp_path)
    margin = page[page.index("RPO: reward margin") : page.index("RPO: log-probabilities")]
    assert "DPO only" in margin
    assert "SFT only" not in margin
    assert "Log-probability of the chosen answers, against the controls" in page


def test_data_stages_and_environment(tmp_path: Path) -> None:
    source = {"documents_read": 12, "documents": 10, "tokens": 3456, "characters_per_token": 1.5, "prefix": "web"}
    manifest = {"tokens": 3456, "documents": 10, "sources": {"web": {**source, "dropped": {"dedup.exact": 2}}}}
    write_json(tmp_path / "corpus" / "medical" / "manifest.json", {**manifest, "inputs": {"a": "b"}})
    tiers = {"by_tier": {"explained gold>wrong": 7}, "samples_by_tier": {"explained wrong": 9}, "drop_reasons": {}}
    contamination = {"checked": True, "dropped": {"q1": ["q2", "same text"]}}
    pairs = {"pairs": 7, "questions": 5, **tiers, "contamination": contamination}
    write_json(tmp_path / "pairs" / "manifest.json", pairs)
    for number, (name, seconds) in enumerate([("cpt", 65.0), ("world", 2.0), ("report", 1.0)]):
        record = {"key": "k", "status": "done", "seconds": seconds, "finished_at": 10.0 - number}
        write_json(tmp_path / "stages" / f"{name}.json", record)
    environment = {"versions": {"torch": "9.9.9"}, "git_revision": "abc123", "machine": {"cores": 2}}
    write_json(tmp_path / "environment.json", environment)
    (tmp_path / "run.yaml").write_text("name: 試験\ndemo: {seed: 0}\n", encoding="utf-8")
    summary = build_report(tmp_path)
    assert (summary["name"], summary["invented"]) == ("試験", True)
    assert [stage["name"] for stage in summary["stages"]] == ["world", "cpt"]  # by end; the report's own is not over
    assert summary["corpora"]["medical"]["sources"]["web"]["dropped"] == {"dedup.exact": 2}
    assert "inputs" not in summary["corpora"]["medical"]
    assert summary["pairs"]["pairs"]["contaminated"] == 1
    page = page_of(tmp_path)
    for text in ("3,456", "dedup.exact 2", "explained gold &gt; wrong", "1 min 05 s", "9.9.9", "abc123", "name: 試験"):
        assert text in page
    assert "Invented content" in page


def test_table_for_the_terminal(published_pattern: Path) -> None:
    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(build_report(published_pattern)))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "CPT + RPO" in line and "0.800" in line)
    assert "0.790" in row
    assert "−0.010" in row
    assert "The effect shows in this run." in text


def test_mode_that_was_not_run(tmp_path: Path) -> None:
    write_eval(tmp_path, "cpt", answer_only=[True, False], explained=[])
    summary = build_report(tmp_path)
    assert (summary["models"]["cpt"]["explained"], summary["models"]["cpt"]["gap"]) == (None, None)
    assert "CPT was examined in one mode only" in page_of(tmp_path)
    Console(file=open("/dev/null", "w")).print(table(summary))  # noqa: SIM115


def test_unfinished_evaluation_is_left_out(published_pattern: Path) -> None:
    (published_pattern / "eval" / "rpo" / "summary.json").unlink()
    summary = build_report(published_pattern)
    assert list(summary["models"]) == ["base", "cpt"]
    assert summary["effect"]["shows"] == "unknown"


def test_nothing_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds nothing of a run"):
        build_report(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_broken_file_is_named(published_pattern: Path) -> None:
    path = published_pattern / "eval" / "cpt" / "results.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n{broken\n")
    with pytest.raises(UserError, match=r"results\.jsonl:2: not JSON"):
        build_report(published_pattern)
    assert not (published_pattern / "report.html").exists()


def test_durations_in_words() -> None:
    assert [seconds_text(s) for s in (4.25, 65, 3599.6, 7620)] == ["4.2 s", "1 min 05 s", "1 h 00 min", "2 h 07 min"]


def test_reward_margin_is_chosen_minus_rejected() -> None:
    rows = [{"step": step, **preference_row(step)} for step in range(3)]
    del rows[1]["rejected_reward"]
    margin = next(chart for chart in training_charts({"rpo": rows}) if chart.title == "RPO: reward margin")
    assert [(x, pytest.approx(y)) for x, y in margin.lines[0].points] == [(0, 0.0), (2, 0.6)]
    assert 'class="zero"' in margin.svg


def test_curves_stand_on_their_scales() -> None:
    """The plot spans x 54..508 and y 212 (bottom) to 10 (top); the scale reaches 4 % beyond the values."""
    chart = line_chart(
        [Line("a", "#000", [(0, 0.0), (10, 100.0)]), Line("b", "#111", [(5, 50.0)], dots=True)], label="<"
    )
    drawn = ElementTree.fromstring(chart)
    assert drawn.find("polyline").get("points") == "54.0,204.5 508.0,17.5"
    assert (drawn.find("circle").get("cx"), drawn.find("circle").get("cy")) == ("281.0", "111.0")
    texts = [text.text for text in drawn.findall("text")]
    assert texts == ["0", "25", "50", "75", "100", "0", "2", "4", "6", "8", "10", "step"]


def test_constant_curve_is_drawn() -> None:
    assert "polyline" in line_chart([Line("a", "#000", [(1, 0.5)])], label="one step")


def test_long_curves_are_smoothed_and_thinned_without_moving() -> None:
    assert smoothing_window(24) == 1
    assert smoothing_window(250) == 11
    assert smoothed([(0, 0.0), (1, 3.0), (2, 0.0), (3, 6.0)], 3) == [(0, 0.0), (1, 1.0), (2, 3.0), (3, 6.0)]
    thin = thinned([(i, float(i)) for i in range(1000)])
    assert (len(thin), thin[0], thin[-1]) == (250, (1.5, 1.5), (997.5, 997.5))
