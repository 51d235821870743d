"""Work in shards: the units, one exam in three parts against one process, what is killed, lost or wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, MaxNewTokens
from megatron_medllm.config.pairs import FilterConfig, PairsConfig, SamplingConfig
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation import run as evaluation
from megatron_medllm.inference import replicas
from megatron_medllm.inference.answer_log import answer_requests
from megatron_medllm.inference.interruption import resumable
from megatron_medllm.inference.protocol import Request
from megatron_medllm.inference.replicas import gpus_by_replica, run_replicas
from megatron_medllm.inference.shards import Shard, request_units, shard_files
from megatron_medllm.inference.transformers_engine import TransformersEngine
from megatron_medllm.preference import pairs
from megatron_medllm.storage import read_json, read_jsonl

RESULTS = ("results.jsonl", "summary.json", "report.md", "report.html")
PAIRS = ("pairs.jsonl", "samples.jsonl", "dropped.jsonl", "manifest.json", "report.md", "report.html")


def exam_config(exam_dir: Path, **engine: object) -> EvalConfig:
    return EvalConfig(
        exam=ExamConfig(name="invented", data=(exam_dir,)),
        engine=EngineConfig(**({"device": "cpu", "unit_requests": 2} | engine)),
        decoding=DecodingConfig(max_new_tokens=MaxNewTokens(answer_only=4, explained=12)),
        resamples=200,
    )


@pytest.fixture(scope="module")
def whole(exam_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    evaluation.run_exam(exam_config(exam_dir), tiny_model, output)
    return output


def assert_same_files(first: Path, second: Path, names: tuple[str, ...]) -> None:
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_units_hold_requests_of_like_length() -> None:
    requests = [Request(f"{n}-{k}", "あ" * n, max_new_tokens=length)
                for length in (32, 8) for n in (5, 1, 3) for k in range(3)]  # fmt: skip
    units = request_units(requests, 4)
    assert [[r.request_id for r in unit] for unit in units] == [
        *2 * [["1-0", "1-1", "1-2", "3-0"], ["3-1", "3-2", "5-0", "5-1"], ["5-2"]]
    ]
    assert [{r.max_new_tokens for r in unit} for unit in units] == [{8}] * 3 + [{32}] * 3
    chat = [Request("long", messages=({"role": "user", "content": "長い"},)), Request("short", "短")]
    assert [r.request_id for r in request_units(chat, 2)[0]] == ["short", "long"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_unit_belongs_to_one_shard(count: int) -> None:
    owners = [Shard.of_unit(n, count) for n in range(12)]
    assert set(owners) <= {Shard(i, count) for i in range(1, count + 1)}
    sizes = [owners.count(Shard(i, count)) for i in range(1, count + 1)]
    assert sum(sizes) == 12 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["4/3", "0/3", "1/0", "1", "a/b", "-1/3", "1/3/5", ""])
def test_what_is_no_shard_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard .*: expected I/N with I from 1 to N, such as 2/3") as caught:
        Shard.parse(text)
    assert "\n" not in str(caught.value)
    assert Shard.parse("3/3") == Shard(3, 3)


@pytest.mark.parametrize("count", [2, 3, 11])  # 11: more than there are units
def test_an_exam_in_shards_equals_one_process(
    exam_dir: Path, tiny_model: Path, tmp_path: Path, whole: Path, count: int
) -> None:
    config = exam_config(exam_dir, replicas=count)
    took = [evaluation.answer_shard(config, tiny_model, tmp_path, Shard(i, count)) for i in range(count, 0, -1)]
    assert sum(timing["answered"] for timing in took) == 12 and not (tmp_path / "results.jsonl").exists()
    summary = evaluation.run_exam(config, tiny_model, tmp_path, merge=True)
    assert_same_files(tmp_path, whole, RESULTS)
    assert summary["timing"]["answered"] == 0 and summary["provenance"]["engine"] == "transformers"
    assert "timing" not in read_json(tmp_path / "summary.json")


def test_pairs_in_shards_equal_one_process(exam_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = PairsConfig(
        questions=ExamConfig(name="invented", data=(exam_dir,)),
        contamination="allow",
        engine=EngineConfig(device="cpu", unit_requests=4),
        sampling=SamplingConfig(
            samples=2, answer_only_samples=1, max_new_tokens=MaxNewTokens(answer_only=4, explained=8)
        ),
        filters=FilterConfig(min_gold_chars=5),
        min_explained_share=0,
    )
    one, parts = tmp_path / "one", tmp_path / "parts"
    pairs.build_pairs(config, tiny_model, one)
    for index in (2, 1, 3):
        pairs.answer_shard(config, tiny_model, parts, Shard(index, 3))
    pairs.build_pairs(config, tiny_model, parts, merge=True)
    assert_same_files(one, parts, PAIRS)


def test_a_killed_shard_decodes_its_unit_again_whole(
    exam_dir: Path, tiny_model: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shard = exam_config(exam_dir), Shard(2, 2)
    evaluation.answer_shard(config, tiny_model, tmp_path, shard)
    log = shard.file(tmp_path / "answers.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:-9])  # one unit, and half of the next
    asked, generate = [], TransformersEngine.generate
    monkeypatch.setattr(TransformersEngine, "generate", lambda s, unit: asked.append(len(unit)) or generate(s, unit))
    took = evaluation.answer_shard(config, tiny_model, tmp_path, shard)
    assert asked == [2, 2] and (took["answered"], took["taken_from_log"]) == (4, 2)
    evaluation.run_exam(config, tiny_model, tmp_path)  # finishes what shard 1/2 has not
    assert_same_files(tmp_path, whole, RESULTS)


def test_a_merge_with_a_missing_shard(exam_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = exam_config(exam_dir)
    for index in (1, 3):
        evaluation.answer_shard(config, tiny_model, tmp_path, Shard(index, 3))
    with pytest.raises(UserError, match=r"shard 2/3 is not complete: 4 requests are unanswered \(first: 90") as caught:
        evaluation.run_exam(config, tiny_model, tmp_path, merge=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "summary.json").exists()


def test_another_shards_log_is_left_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    """Its last line may be half written at this moment."""
    log, requests = tmp_path / "a.jsonl", [Request(str(n), "問" * n, max_new_tokens=2) for n in range(1, 5)]
    config = EngineConfig(device="cpu", unit_requests=1)
    for index in (1, 2):
        answer_requests(config, tiny_model, requests, log=log, title="t", shard=Shard(index, 2))
    others = Shard(1, 2).file(log)
    cut = others.read_bytes()[:-5]
    others.write_bytes(cut)
    found = answer_requests(config, tiny_model, requests, log=log, title="t", shard=Shard(2, 2))
    assert others.read_bytes() == cut and found.timing["answered"] == 0
    assert list(shard_files(log).values()) == [Shard(1, 2), Shard(2, 2)]
    assert answer_requests(config, tiny_model, requests, log=log, title="t").timing["answered"] == 1


def test_engines_that_differ_are_all_told(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, requests = tmp_path / "a.jsonl", [Request(str(n), "問", max_new_tokens=2) for n in range(2)]
    config, describe = EngineConfig(device="cpu", unit_requests=1), TransformersEngine.describe
    answer_requests(config, tiny_model, requests, log=log, title="t", shard=Shard(1, 2))
    monkeypatch.setattr(TransformersEngine, "describe", lambda self: describe(self) | {"torch": "9.9"})
    answer_requests(config, tiny_model, requests, log=log, title="t", shard=Shard(2, 2))
    told = answer_requests(config, tiny_model, requests, log=log, title="t").provenance
    assert "9.9" in told["torch"] and len(told["torch"]) == 2 and told["engine"] == "transformers"


def test_replicas_share_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    four = EngineConfig(kind="vllm", python=Path(sys.executable), tensor_parallel=2, replicas=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    assert gpus_by_replica(four) == ["4,5", "6,7"]
    assert gpus_by_replica(EngineConfig(replicas=3)) == ["4", "5", "6"]
    assert gpus_by_replica(EngineConfig(replicas=3, device="cpu")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(UserError, match=r"engine.replicas=2 of 2 GPUs each need 4; 3 are visible"):
        gpus_by_replica(four)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_by_replica(EngineConfig(replicas=3)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": 2, "device": "cuda:1"}, "cannot share engine.device=cuda:1"),
        ({"replicas": 2, "kind": "openai", "url": "http://x"}, "raise engine.concurrency"),
    ],
)
def test_replicas_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def write_exam_recipe(exam_dir: Path, model: Path, run_dir: Path, **engine: object) -> Path:
    config = exam_config(exam_dir, **engine).model_dump(mode="json")
    path = run_dir.with_suffix(".yaml")
    path.write_text(
        yaml.safe_dump({"name": "x", "run_dir": str(run_dir), "model": {"path": str(model)}, "eval": config})
    )
    return path


def test_local_replicas_equal_one_process(exam_dir: Path, tiny_model: Path, tmp_path: Path, whole: Path) -> None:
    recipe = write_exam_recipe(exam_dir, tiny_model, tmp_path / "run", replicas=2)
    done = CliRunner().invoke(app, ["eval", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0
    assert_same_files(tmp_path / "run" / "eval", whole, RESULTS[:-1])  # its page links to the run's
    logs = [list(read_jsonl(Shard(i, 2).file(tmp_path / "run" / "eval" / "answers.jsonl"))) for i in (1, 2)]
    assert [len(log) for log in logs] == [6, 6] and not (tmp_path / "run" / "eval" / "answers.jsonl").exists()
    assert "6 requests answered" in (tmp_path / "run" / "eval" / "shards" / "2-of-2.log").read_text()


def test_a_failing_replica_names_itself_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nfor last; do :; done\n[ $last = 2/3 ] || exec sleep 600\necho "error: no luck"; exit 7\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(replicas.sys, "executable", str(python))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(replicas.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(UserError, match=r"shard 2/3 failed \(exit status 7; log: .*2-of-3\.log: error: no luck\)"):
        run_replicas(EngineConfig(device="cpu", replicas=3), ["eval"], tmp_path)
    assert len(started) == 3 and all(process.poll() is not None for process in started)


def test_usr1_asks_for_another_start() -> None:
    with pytest.raises(SystemExit) as caught, resumable():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
    assert caught.value.code == REQUEUE_EXIT_CODE and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("command", [["eval", "run"], ["pairs"]])
def test_bad_options_are_one_line(command: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    for options, message in (
        (["--shard", "4/3"], "--shard 4/3: expected I/N"),
        (["--shard", "1/3", "--merge"], "give one of them"),
    ):
        done = CliRunner().invoke(app, [*command, str(recipe), *options])
        assert isinstance(done.exception, UserError) and message in str(done.exception)
