"""An exam whose answers a script gives: every number of the summary is known beforehand."""

import json
from pathlib import Path

import pytest

from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, PromptConfig
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.compare import compare_evaluations, compare_markdown
from megatron_medllm.evaluation.run import run_exam
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.prompts import MODES
from megatron_medllm.inference.exam_requests import ExamPrompter
from megatron_medllm.storage import read_json, read_jsonl
from tests.worlds.exam import ScriptedEndpoint

# What the script answers, by a piece of the question: answer only, explained.
ANSWERS = {
    "ソラ病": ("b", "aは誤り。bは正しい。\n答え: b"),  # right, right
    "カゼ病": ("a,c", "考えた。\n答え: a,d"),  # right, wrong and prohibited
    "誤っている": ("b", "よくわからない。"),  # right, malformed
    "老人が転んだ": ("c", "固定する。\n答え: b"),  # wrong, right
    "次に行う": ("a", "撮影する。\n答え: a"),  # right, right
    "体温": ("36.5度", "計算。\n答え: 36.4"),  # right, wrong
}


def script(body: dict) -> str:
    prompt = body.get("prompt") or body["messages"][-1]["content"]
    short, explained = next(pair for piece, pair in ANSWERS.items() if piece in prompt)
    return explained if prompt.endswith("考察:") else short


def config(exam_dir: Path, url: str, **changes: object) -> EvalConfig:
    settings = {
        "exam": ExamConfig(name="invented", data=(exam_dir,)),
        "engine": EngineConfig(kind="openai", url=url, retries=0),
        "resamples": 500,
    }
    return EvalConfig(**(settings | changes))


@pytest.fixture(scope="module")
def finished(exam_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("eval")
    with ScriptedEndpoint(script) as server:
        require = ("gap >= -0.02", "answer_only.accuracy >= 0.8", "malformed_rate < 0.2")
        return run_exam(config(exam_dir, server.url, require=require), Path("scripted"), output), output


def test_scores_per_mode(finished: tuple[dict, Path]) -> None:
    answered, explained = (finished[0]["modes"][mode] for mode in ("answer_only", "explained"))
    assert (answered["n"], answered["correct"], answered["points"], answered["possible"]) == (6, 5, 9, 10)
    assert (explained["n"], explained["correct"], explained["points"]) == (6, 3, 3)
    assert answered["accuracy"] == 5 / 6 and answered["points_rate"] == 0.9
    assert answered["malformed"] == 0 and explained["malformed"] == 1
    assert explained["malformed_reasons"] == {"no answer line": 1}
    assert answered["text_only"] == {
        "n": 5,
        "correct": 4,
        "points": 8,
        "possible": 9,
        "accuracy": 0.8,
        "points_rate": 8 / 9,
    }
    assert answered["by_year"]["2001"]["accuracy"] == 1.0
    assert answered["by_year"]["2002"]["correct"] == 2
    assert answered["by_section"]["B"]["points"] == 6
    assert answered["by_category"]["薬理"]["accuracy"] == 1.0
    assert explained["by_year"]["2001"]["prohibited"] == 1
    assert answered["by_year"]["2001"]["passed"] is None  # an invented exam has no official mark


def test_the_stability_gap(finished: tuple[dict, Path]) -> None:
    gap = finished[0]["gap"]
    assert gap["accuracy"]["estimate"] == pytest.approx(-2 / 6)
    assert gap["points_rate"]["estimate"] == pytest.approx(-6 / 10)
    assert gap["accuracy"]["low"] <= -2 / 6 <= gap["accuracy"]["high"]
    assert (gap["right_to_wrong"], gap["wrong_to_right"]) == (3, 1)
    assert gap["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)
    assert gap["by_category"]["薬理"] == {"n": 1, "estimate": -1.0, "low": -1.0, "high": -1.0}


def test_requirements(finished: tuple[dict, Path]) -> None:
    rows = finished[0]["requirements"]
    assert [row["met"] for row in rows] == [False, True, True]
    assert rows[0]["value"] == pytest.approx(-1 / 3)


def test_results_hold_every_answer(finished: tuple[dict, Path]) -> None:
    rows = list(read_jsonl(finished[1] / "results.jsonl"))
    assert len(rows) == 12
    row = next(r for r in rows if r["problem_id"] == "900A2" and r["mode"] == "explained")
    assert row["prompt"].endswith("ちょうど2個選んでください。\n考察:")
    assert row["output"] == "考えた。\n答え: a,d"
    assert (row["parsed"], row["gold"], row["correct"], row["points"]) == (["a", "d"], [["a", "c"]], False, 0)
    assert row["prohibited"] and row["human_accuracy"] == 0.875
    assert next(r for r in rows if r["problem_id"] == "900B1" and r["mode"] == "explained")["parsed"] is None
    written = {name: read_json(finished[1] / f"{name}.json") for name in ("summary", "timing")}
    assert written["summary"] | {"timing": written["timing"]} == finished[0]


def test_reports_show_it(finished: tuple[dict, Path]) -> None:
    markdown = (finished[1] / "report.md").read_text()
    assert "| answer only | 0.833 |" in markdown and "**−0.333 [" in markdown
    assert "| gap >= -0.02 | -0.3333 | NOT met |" in markdown
    html = (finished[1] / "report.html").read_text()
    assert html.count("<svg") == 3 and "薬理 (1)" in html
    assert "Right, then wrong when explaining" in html and "900A2: a,c → a,d (gold a,c)" in html
    assert "Malformed answers" in html and "よくわからない。" in html
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in html.replace("http://127.0.0.1", "")


def test_outputs_are_escaped(exam_dir: Path, tmp_path: Path) -> None:
    with ScriptedEndpoint(lambda body: "<script>alert(1)</script>") as server:
        run_exam(config(exam_dir, server.url), Path("m"), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_limit_modes_and_samples(exam_dir: Path, tmp_path: Path) -> None:
    """Three samples: right, wrong, right. The first is the headline, the majority is right."""
    seen: list[int] = []

    def alternating(body: dict) -> str:
        seen.append(body["seed"])
        return "c" if len(seen) % 3 == 2 else "b"

    with ScriptedEndpoint(alternating) as server:
        summary = run_exam(
            config(
                exam_dir,
                server.url,
                engine=EngineConfig(kind="openai", url=server.url, concurrency=1),
                exam=ExamConfig(name="invented", data=(exam_dir,), limit=1),
                modes=("answer_only",),
                samples=3,
                decoding=DecodingConfig(temperature=0.8),
            ),
            Path("m"),
            tmp_path,
        )
    assert summary["questions"] == 1 and "gap" not in summary and len(set(seen)) == 3
    samples = summary["modes"]["answer_only"]["samples"]
    assert samples == {
        "samples_per_question": 3.0,
        "mean_accuracy": pytest.approx(2 / 3),
        "majority_accuracy": 1.0,
        "consistency": pytest.approx(2 / 3),
    }


def test_chat_and_shots_reach_the_model(exam_dir: Path, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    rows = [
        {
            "problem_id": f"s{number}",
            "problem_text": "別の例題。",
            "choices": ["甲", "乙"],
            "answer": ["b"],
            "explanation": "乙。",
        }
        for number in range(2)
    ]
    shots.write_text("\n".join(map(json.dumps, rows)))
    prompt = PromptConfig(chat=True, shots=2, shot_file=shots)
    with ScriptedEndpoint(script) as server:
        run_exam(config(exam_dir, server.url, prompt=prompt), Path("m"), tmp_path / "out")
    path, body = server.calls[0]
    assert path == "/v1/chat/completions"
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    with pytest.raises(UserError, match=r"holds 2 worked examples, prompt\.shots asks for 3"):
        run_exam(config(exam_dir, server.url, prompt=PromptConfig(shots=3, shot_file=shots)), Path("m"), tmp_path)
    with pytest.raises(UserError, match="needs worked examples"):
        run_exam(config(exam_dir, server.url, prompt=PromptConfig(shots=3)), Path("m"), tmp_path)


def test_a_worked_example_that_is_a_question_of_the_exam(exam_dir: Path, tmp_path: Path) -> None:
    """The same text in full width and under another id is the same question."""
    rows = [json.loads(line) for line in (exam_dir / "2001" / "900-A.jsonl").read_text().splitlines()]
    wide = rows[1]["problem_text"].translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps(rows[1] | {"problem_id": "s1", "problem_text": wide}))
    prompt = PromptConfig(shots=1, shot_file=shots)
    with pytest.raises(UserError, match="few-shot item s1 is question 900A2 of the exam"):
        run_exam(config(exam_dir, "http://x", prompt=prompt), Path("m"), tmp_path / "out")


def test_bad_configurations(exam_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would give the same answer again"):
        config(exam_dir, "http://x", samples=2)
    with pytest.raises(UserError, match="unknown metric 'acuracy'; known: accuracy, "):
        run_exam(config(exam_dir, "http://x", require=("acuracy > 0.5",)), Path("m"), tmp_path)
    with pytest.raises(UserError, match="unknown metric 'gap'"):
        run_exam(config(exam_dir, "http://x", require=("gap > 0",), modes=("explained",)), Path("m"), tmp_path)
    with pytest.raises(UserError, match="expected METRIC >= NUMBER"):
        run_exam(config(exam_dir, "http://x", require=("gap is good",)), Path("m"), tmp_path)
    with pytest.raises(UserError, match="no such model directory"):
        run_exam(config(exam_dir, "", engine=EngineConfig()), tmp_path / "nowhere", tmp_path)


def test_compare(finished: tuple[dict, Path], exam_dir: Path, tmp_path: Path) -> None:
    with ScriptedEndpoint(lambda body: "答え: b") as server:
        run_exam(config(exam_dir, server.url), Path("m"), tmp_path / "always-b")
    comparison = compare_evaluations([finished[1], tmp_path / "always-b"], resamples=200)
    assert [(row["mode"], row["points"]) for row in comparison["rows"]][2:] == [("answer_only", 5), ("explained", 5)]
    assert comparison["published"] == []  # the literature's rows belong to IgakuQA
    short, explained = comparison["differences"]
    assert (short["n"], short["lost"], short["won"]) == (6, 3, 1)
    assert short["accuracy"]["estimate"] == pytest.approx(-2 / 6)
    assert (explained["lost"], explained["won"]) == (1, 1)
    text = compare_markdown(comparison)
    assert "| always-b | answer_only | 4 | 1 | 5/10 |" in text
    with pytest.raises(UserError, match=r"holds no summary\.json"):
        compare_evaluations([tmp_path])


class LongEndpoint(ScriptedEndpoint):
    """A server that always runs into the limit."""

    finish_reason = "length"


def test_a_model_that_runs_on_is_cut_off_only_where_no_answer_came(exam_dir: Path, tmp_path: Path) -> None:
    def running_on(body: dict) -> str:
        if not body["prompt"].endswith("考察:"):
            return "b\n考察: 次の文"
        if "カゼ病" in body["prompt"]:  # the limit came right behind the answer
            return "aは誤り。\n答え: b"
        first = "ソラ病の主症状" in body["prompt"]
        return "よくわからないが、" * 9 if first else "aは誤り。\n答え: b\n\n問題: 次\n答え: c"

    with LongEndpoint(running_on) as server:
        summary = run_exam(config(exam_dir, server.url), Path("m"), tmp_path)
    rows = list(read_jsonl(tmp_path / "results.jsonl"))
    assert {row["output"] for row in rows if row["mode"] == "answer_only"} == {"b"}
    assert {name: mode["truncated"] for name, mode in summary["modes"].items()} == {"answer_only": 0, "explained": 1}
    assert summary["modes"]["explained"]["malformed"] == 2  # the calculation's b is complete, but no number
    assert sum(row["output"] == "aは誤り。\n答え: b" for row in rows) == 5


def test_chat_models_end_their_short_answers_themselves(exam_dir: Path) -> None:
    """They may lead up to it with a line of its own: `答えは次の通りです。`"""
    question = load_exam("invented", (exam_dir,)).questions[0]
    for chat, short in ((False, "answer_only"), (True, None)):
        prompter = ExamPrompter(PromptConfig(chat=chat), (exam_dir,))
        asked = {mode: prompter.request(question, mode, DecodingConfig()).ends_as for mode in MODES}
        assert asked == {"answer_only": short, "explained": "explained"}
