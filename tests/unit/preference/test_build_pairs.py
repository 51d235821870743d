"""Pairs from an invented exam and scripted samples: tiers, weights, filters and drops are known beforehand."""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_medllm.config.exam import EngineConfig, ExamConfig, PromptConfig
from megatron_medllm.config.pairs import FilterConfig, PairsConfig, SamplingConfig, TierWeights
from megatron_medllm.errors import UserError
from megatron_medllm.preference.pairs import build_pairs, training_questions
from megatron_medllm.storage import read_json, read_jsonl
from tests.worlds.exam import ScriptedEndpoint

RIGHT = "症状から考えると、bが当てはまる。\n答え: b"
WRONG = "眠気が主であるから、aと考えられる。\n答え: a"
MALFORMED = "いろいろ考えたが、結局よくわからなかった。"


def script(body: dict) -> str:
    """By temperature: 0.5 right, 0.7 wrong, 1.0 malformed; short answers wrong."""
    if not body["prompt"].endswith("考察:"):
        return "d"
    return {0.5: RIGHT, 0.7: WRONG, 1.0: MALFORMED}[body["temperature"]]


def config(exam_dir: Path, url: str, **changes: object) -> PairsConfig:
    settings = {
        "questions": ExamConfig(name="invented", data=(exam_dir / "2001",), limit=1),  # 900A1, gold b
        "contamination": "allow",
        "engine": EngineConfig(kind="openai", url=url, retries=0),
        "sampling": SamplingConfig(samples=1, temperatures=(0.5, 0.7, 1.0), answer_only_samples=1),
        "filters": FilterConfig(min_gold_chars=5),
        "max_pairs": 10,
    }
    return PairsConfig(**(settings | changes))


def build(exam_dir: Path, output: Path, **changes: object) -> tuple[dict, list[dict]]:
    with ScriptedEndpoint(script) as server:
        manifest = build_pairs(config(exam_dir, server.url, **changes), Path("scripted"), output)
    return manifest, list(read_jsonl(output / "pairs.jsonl"))


def test_the_hierarchy(exam_dir: Path, tmp_path: Path) -> None:
    manifest, rows = build(exam_dir, tmp_path)
    gold = "aは誤り。bは正しい。cは誤り。dは誤り。eは誤り。\n答え: b"
    explained = {row["tier"]: row for row in rows if row["mode"] == "explained"}
    assert {tier: (row["chosen"], row["rejected"], row["weight"]) for tier, row in explained.items()} == {
        "gold>wrong": (gold, WRONG, 1.0),
        "right>wrong": (RIGHT, WRONG, 1.0),
        "gold>right": (gold, RIGHT, 0.5),
        "gold>malformed": (gold, MALFORMED, 0.5),
        "right>malformed": (RIGHT, MALFORMED, 0.5),
    }
    (short,) = (row for row in rows if row["mode"] == "answer_only")
    assert (short["chosen"], short["rejected"], short["tier"]) == ("b", "d", "gold>wrong")
    assert short["prompt"].endswith("\n答え:") and explained["gold>wrong"]["prompt"].endswith("\n考察:")
    assert {row["source"] for row in rows} == {"invented"}
    assert manifest["pairs"] == 6 and manifest["by_tier"]["explained gold>right"] == 1
    assert manifest["samples_by_tier"] == {
        "explained right": 1,
        "explained wrong": 1,
        "explained malformed": 1,
        "answer_only wrong": 1,
    }


def test_provenance(exam_dir: Path, tmp_path: Path) -> None:
    manifest, rows = build(exam_dir, tmp_path)
    written = next(row["rejected_by"] for row in rows if row["tier"] == "gold>wrong" and row["mode"] == "explained")
    assert (written["written_by"], written["temperature"]) == ("model", 0.7) and written["seed"] > 0
    assert rows[0]["chosen_by"] == {"written_by": "data"}
    assert manifest["provenance"]["served_model"] == written["served_model"] == "scripted"
    samples = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert all(s["prompt"].startswith("問題: ソラ病") for s in samples)
    assert Counter(s["tier"] for s in samples) == {"right": 1, "wrong": 2, "malformed": 1}
    assert read_json(tmp_path / "manifest.json") == manifest
    report = (tmp_path / "report.md").read_text()
    assert "| explained gold>wrong | 1 |" in report and "contamination check: NOT done" in report and WRONG in report


def test_weights_and_limits(exam_dir: Path, tmp_path: Path) -> None:
    weights = TierWeights(gold_over_right=0, right_over_malformed=0, gold_over_malformed=0, wrong_over_malformed=2.0)
    _, rows = build(exam_dir, tmp_path / "weights", weights=weights)
    tiers = [row["tier"] for row in rows if row["mode"] == "explained"]
    assert sorted(tiers) == ["gold>wrong", "right>wrong", "wrong>malformed"]
    assert tiers[0] == "wrong>malformed"  # the heaviest first
    manifest, rows = build(exam_dir, tmp_path / "few", max_pairs=2, max_answer_only_pairs=0)
    assert len(rows) == 2 and manifest["drop_reasons"] == {"more than max_pairs": 3}
    # Two pairs, two different mistakes shown, though right>wrong weighs more than gold>malformed.
    assert len({row["rejected"] for row in rows}) == 2


def test_drops_are_written_down(exam_dir: Path, tmp_path: Path) -> None:
    filters = FilterConfig(min_gold_chars=500)
    manifest, rows = build(exam_dir, tmp_path, filters=filters)
    assert manifest["drop_reasons"] == {"gold explanation too short": 1}
    assert list(read_jsonl(tmp_path / "dropped.jsonl")) == [
        {"problem_id": "900A1", "mode": "explained", "tier": "gold", "reason": "gold explanation too short"}
    ]
    assert {row["tier"] for row in rows if row["mode"] == "explained"} == {"right>wrong", "right>malformed"}


def test_the_same_again(exam_dir: Path, tmp_path: Path) -> None:
    with ScriptedEndpoint(script) as server:
        one, two = (build_pairs(config(exam_dir, server.url), Path("m"), tmp_path / name) for name in ("one", "two"))
    assert one["digest"] == two["digest"]


def test_sampling_with_shots_trains_without(exam_dir: Path, tmp_path: Path) -> None:
    shots = exam_dir / "2001" / "900-B.jsonl"
    prompt = PromptConfig(shots=1, shot_file=shots)
    _, rows = build(exam_dir, tmp_path / "without", prompt=prompt)
    assert all(row["prompt"].count("問題:") == 1 for row in rows)
    _, rows = build(exam_dir, tmp_path / "with", prompt=prompt, train_without_shots=False)
    assert all(row["prompt"].count("問題:") == 2 for row in rows)


def test_chat_prompts_are_messages(exam_dir: Path, tmp_path: Path) -> None:
    def chat_script(body: dict) -> str:
        return script({**body, "prompt": body["messages"][-1]["content"]})

    with ScriptedEndpoint(chat_script) as server:
        build_pairs(config(exam_dir, server.url, prompt=PromptConfig(chat=True)), Path("m"), tmp_path)
    row = next(read_jsonl(tmp_path / "pairs.jsonl"))
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_synthetic_wrong_answers_and_no_model(exam_dir: Path, tmp_path: Path) -> None:
    """Without samples there are only answer-only pairs, their wrong side one choice on. The model is not asked."""
    sampling = SamplingConfig(samples=0, answer_only_samples=0)
    questions = ExamConfig(name="invented", data=(exam_dir,))
    built = build_pairs(
        config(exam_dir, "http://127.0.0.1:9", sampling=sampling, questions=questions, parquet=True),
        Path("m"),
        tmp_path,
    )
    rows = {row["problem_id"]: row for row in read_jsonl(tmp_path / "pairs.jsonl")}
    assert built["by_tier"] == {"answer_only gold>wrong": 5}  # the numeric question has no neighbour
    assert (rows["900A2"]["chosen"], rows["900A2"]["rejected"]) == ("a,c", "b,d")
    assert rows["900A1"]["rejected_by"] == {"written_by": "synthetic"}
    table = pyarrow.parquet.read_table(tmp_path / "pairs.parquet")
    assert table.num_rows == 5 and table["chosen"].to_pylist()[0] == "b"


def test_contamination_is_refused(exam_dir: Path, tmp_path: Path) -> None:
    exam = ExamConfig(name="invented", data=(exam_dir,), limit=1)
    same = {"exam": exam, "contamination": "refuse", "questions": exam}
    with pytest.raises(UserError, match=r"1 of 1 are in the evaluation exam \(first: 900A1 and 900A1, year 2001"):
        build(exam_dir, tmp_path, **same)
    copied = {"exam": ExamConfig(name="renamed", data=(exam_dir / "2002",), limit=1), "contamination": "refuse"}
    copied["questions"] = ExamConfig(name="invented", data=(exam_dir,))
    with pytest.raises(UserError, match=r"3 of 6 .*901A1 and 901A1, nearly the same text"):
        build(exam_dir, tmp_path, **copied)
    questions, report = training_questions(config(exam_dir, "http://x", **(copied | {"contamination": "drop"})))
    assert [q.problem_id for q in questions] == ["900A1", "900A2", "900B1"]
    assert report["dropped"]["901A1"] == ["901A1", "nearly the same text"]
    with pytest.raises(ValueError, match="set `exam` to the evaluation exam"):
        config(exam_dir, "http://x", contamination="refuse")


def test_nothing_left(exam_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair is left of 1 questions and 3 samples"):
        build(
            exam_dir,
            tmp_path,
            max_answer_only_pairs=0,
            filters=FilterConfig(min_gold_chars=500, min_edit_distance=1.0),
        )
    assert not (tmp_path / "pairs.jsonl").exists()


def test_bad_sampling() -> None:
    with pytest.raises(ValueError, match="would give the same sample again"):
        SamplingConfig(samples=2, temperatures=(0.0,))
    with pytest.raises(ValueError, match="the same one twice"):
        SamplingConfig(temperatures=(1.0, 1.0))


ENDLESS = "この病気の症状は、" * 40  # what a base model writes on and on, and never reaches an answer


class EndlessEndpoint(ScriptedEndpoint):
    """Answers that the limit cut off: `finish_reason` is "length"."""

    finish_reason = "length"


def endless(exam_dir: Path, output: Path, text: str = ENDLESS, **changes: object) -> tuple[dict, list[dict]]:
    sampling = SamplingConfig(samples=1, temperatures=(1.0,), answer_only_samples=0)
    with EndlessEndpoint(lambda body: text) as server:
        manifest = build_pairs(config(exam_dir, server.url, **({"sampling": sampling} | changes)), Path("m"), output)
    return manifest, list(read_jsonl(output / "pairs.jsonl"))


def test_what_reaches_no_answer_is_rejected_not_dropped(exam_dir: Path, tmp_path: Path) -> None:
    """A base model's explanations run into the limit: each makes a pair, cut to the ratio, without an end token."""
    manifest, rows = endless(exam_dir, tmp_path)
    (pair,) = (row for row in rows if row["mode"] == "explained")
    gold = "aは誤り。bは正しい。cは誤り。dは誤り。eは誤り。\n答え: b"
    assert (pair["tier"], pair["chosen"]) == ("gold>malformed", gold)
    assert pair["rejected"] == ENDLESS[: len(gold)] and len(ENDLESS) > 4 * len(gold)
    assert (pair["chosen_ended"], pair["rejected_ended"]) == (True, False)
    assert manifest["samples_by_tier"] == {"explained malformed": 1} and manifest["explained_questions"] == 1
    assert manifest["account"]["subjects"]["explained malformed"] == {"kept": 1, "lost": {}}


def test_how_much_of_it_is_kept(exam_dir: Path, tmp_path: Path) -> None:
    filters = FilterConfig(min_gold_chars=5, malformed_length=2.0, max_length_ratio=1.0)
    _, rows = endless(exam_dir, tmp_path, filters=filters)
    (pair,) = (row for row in rows if row["mode"] == "explained")
    assert pair["rejected"] == ENDLESS[: 2 * len(pair["chosen"])]


def test_a_short_malformed_answer_is_rejected_too(exam_dir: Path, tmp_path: Path) -> None:
    _, rows = endless(exam_dir, tmp_path, text="？")
    assert [row["rejected"] for row in rows if row["mode"] == "explained"] == ["？"]


def test_an_answer_that_the_limit_cut_in_two_is_dropped(exam_dir: Path, tmp_path: Path) -> None:
    cut = "眠気が主であるから、次のように考えられる。\n答え: a、ただ"
    with pytest.raises(
        UserError, match=r"explained wrong: 0 .* kept; .*explained wrong: lost 1 \(truncated\), first 900A1"
    ):
        endless(exam_dir, tmp_path, text=cut)
    (sample,) = read_jsonl(tmp_path / "samples.jsonl")  # left to look at
    assert (sample["tier"], sample["truncated"]) == ("wrong", True)
    _, rows = endless(exam_dir, tmp_path / "kept", text=cut, filters=FilterConfig(min_gold_chars=5, truncated=False))
    assert [row["tier"] for row in rows if row["mode"] == "explained"] == ["gold>wrong"]


def test_too_few_explained_pairs_stop_and_say_what_the_filters_left(exam_dir: Path, tmp_path: Path) -> None:
    filters = FilterConfig(min_gold_chars=21)  # 901A1 and 901A2 are shorter
    whole = {"questions": ExamConfig(name="invented", data=(exam_dir,)), "filters": filters}
    with pytest.raises(UserError) as stopped:
        endless(exam_dir, tmp_path, **whole, min_explained_share=0.75)
    assert re.match(
        r"only 3 of 6 questions have an explained pair, fewer than pairs\.min_explained_share=0\.75 of them \("
        r"explained malformed: 6 .* kept; explained gold: 3 .* kept; explained gold>malformed: 3 .* kept; "
        r"explained gold: lost 3 \(gold explanation too short\), first 901A1\); see dropped\.jsonl",
        str(stopped.value),
    )
    assert not (tmp_path / "pairs.jsonl").exists() and (tmp_path / "dropped.jsonl").exists()
    manifest, _ = endless(exam_dir, tmp_path, **whole, min_explained_share=0.5)
    assert manifest["explained_questions"] == 3
    assert "3 of the questions have an explained pair" in (tmp_path / "report.md").read_text()
    assert "| explained gold | 3 | gold explanation too short 3 |" in (tmp_path / "report.md").read_text()


def test_a_tier_that_the_filters_take_whole_is_an_error() -> None:
    from megatron_medllm.preference.candidate import Candidate
    from megatron_medllm.preference.pairing import Drop
    from megatron_medllm.preference.pairs import pairs_account, require_pairs

    settings = config(Path("x"), "http://x")
    rows = [{"mode": "explained", "tier": "gold>malformed", "problem_id": str(n)} for n in range(20)]
    for count, refused in ((19, False), (20, True)):
        samples = [Candidate(str(n), "explained", "right", "t", ("a",), {}) for n in range(count)]
        drops = [Drop(str(n), "explained", "right", "language") for n in range(count)]
        account = pairs_account(samples, rows, drops, gold=20)
        if refused:
            with pytest.raises(
                UserError, match=r"explained right: none of 20 .*\(language: 20, first 0\); loosen pairs"
            ):
                require_pairs(settings, account, rows, drops, questions=20, samples=count)
        else:
            require_pairs(settings, account, rows, drops, questions=20, samples=count)


def test_questions_without_explanations_are_counted(exam_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "exam"
    directory.mkdir()
    rows = [
        {k: v for k, v in row.items() if k != "explanation"} for row in read_jsonl(exam_dir / "2001" / "900-A.jsonl")
    ]
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        UserError, match=r"only 0 of 2 .*explained gold: lost 2 \(the data explain nothing\), first 900A1"
    ):
        endless(exam_dir, tmp_path / "out", questions=ExamConfig(name="invented", data=(directory,)))
