"""Whole exams on a real (tiny, random) transformers model: killed, resumed, and all two thousand questions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, MaxNewTokens, PromptConfig
from megatron_medllm.config.pairs import FilterConfig, PairsConfig, SamplingConfig
from megatron_medllm.evaluation.run import ANSWER_LOG, run_exam
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.preference.pairs import build_pairs
from megatron_medllm.storage import digest_file, read_jsonl
from tests.worlds.model_dir import write_tiny_model

CHILD = """
import sys
from pathlib import Path
from megatron_medllm.config.exam import EvalConfig
from megatron_medllm.evaluation.run import run_exam
run_exam(EvalConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def start(config: EvalConfig, model: Path, output: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-c", CHILD, config.model_dump_json(), str(model), str(output)]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def kill_after(process: subprocess.Popen, log: Path, answers: int) -> int:
    """`kill -9` once the log holds so many answers; returns how many whole ones it then has."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= answers:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return log.read_bytes().count(b"\n")
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    raise AssertionError("no answers in two minutes")


def test_killed_and_resumed(exam_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        exam=ExamConfig(name="invented", data=(exam_dir,)),
        # One sequence at a time and long answers: the kill falls in the middle.
        engine=EngineConfig(device="cpu", batch_size=1),
        decoding=DecodingConfig(max_new_tokens=MaxNewTokens(answer_only=100, explained=200)),
        resamples=200,
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kept = kill_after(start(config, tiny_model, killed), killed / ANSWER_LOG, 3)
    assert 3 <= kept < 12 and not (killed / "summary.json").exists()
    resumed = run_exam(config, tiny_model, killed)
    assert (resumed["timing"]["taken_from_log"], resumed["timing"]["answered"]) == (kept, 12 - kept)
    run_exam(config, tiny_model, whole)
    assert digest_file(killed / "results.jsonl") == digest_file(whole / "results.jsonl")


def test_all_of_igakuqa_in_both_modes(shared_data: Path, tmp_path: Path) -> None:
    """2,000 questions twice; the numbers are chance (or all malformed), the machinery is real."""
    exam = load_exam("igakuqa", [shared_data / "igakuqa"])
    texts = [q.problem_text for q in exam.questions[:200]]
    model = write_tiny_model(tmp_path / "model", texts=texts, vocab_size=2000)
    config = EvalConfig(
        exam=ExamConfig(name="igakuqa", data=(shared_data / "igakuqa",)),
        decoding=DecodingConfig(max_new_tokens=MaxNewTokens(answer_only=4, explained=8)),
        resamples=500,
        engine=EngineConfig(device="cpu"),
    )
    output = tmp_path / "out"
    kept = kill_after(start(config, model, output), output / ANSWER_LOG, 900)
    assert kept < 4000
    summary = run_exam(config, model, output)
    # Of the unit that the kill interrupted nothing is taken: it is decoded again whole.
    assert kept - config.engine.unit_size < summary["timing"]["taken_from_log"] <= kept
    for result in summary["modes"].values():
        assert (result["n"], result["possible"], result["text_only"]["n"]) == (2000, 2485, 1471)
        assert result["correct"] >= 1  # 116A71: everyone is credited
        assert [year["passed"] for year in result["by_year"].values()] == [False] * 5
    assert sum(1 for _ in read_jsonl(output / "results.jsonl")) == 4000
    assert (output / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize("letters", [True, False])
def test_pairs_from_the_pharmacists_exam(shared_data: Path, tiny_model: Path, tmp_path: Path, letters: bool) -> None:
    """Real gold comments against samples of a model that can only babble, checked against IgakuQA's questions."""
    config = PairsConfig(
        questions=ExamConfig(
            name="yakugakuqa", data=(shared_data / "yakugakuqa" / "2020.jsonl",), text_only=True, limit=60
        ),
        exam=ExamConfig(name="igakuqa", data=(shared_data / "igakuqa",)),
        prompt=PromptConfig(),
        letters=letters,
        engine=EngineConfig(device="cpu"),
        sampling=SamplingConfig(
            samples=2, temperatures=(1.0,), max_new_tokens=MaxNewTokens(answer_only=4, explained=24)
        ),
        # Babble is short, and never ends by itself.
        filters=FilterConfig(truncated=False, max_length_ratio=100),
    )
    manifest = build_pairs(config, tiny_model, tmp_path)
    rows = list(read_jsonl(tmp_path / "pairs.jsonl"))
    assert manifest["questions"] == 60 and manifest["contamination"]["checked"]
    assert manifest["pairs"] == len(rows) > 100
    golds = {q.problem_id: q for q in load_exam("yakugakuqa", config.questions.data).questions}
    for row in rows:
        gold = golds[row["problem_id"]]
        answer = ",".join("abcdefgh"[int(i) - 1] if letters else i for i in gold.accepted[0])
        if row["mode"] == "explained" and row["chosen_by"]["written_by"] == "data":
            assert row["chosen"].endswith(f"\n答え: {answer}")
            assert row["prompt"].startswith(f"問題: {gold.problem_text}\n{'a' if letters else '1'}: {gold.choices[0]}")
        if row["rejected_by"]["written_by"] == "model":
            assert row["rejected_by"]["temperature"] == 1.0 and "seed" in row["rejected_by"]
    assert len(manifest["provenance"]["model_digest"]) == 64
