"""Killed at any moment, run again: the same bytes. And what may not be resumed is refused."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus import index
from megatron_medllm.corpus.build import build
from megatron_medllm.errors import UserError
from tests.worlds.corpus import SENTENCES, contents, write_jsonl

SCRIPT = """
import sys
from pathlib import Path
from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.build import build
if __name__ == "__main__":
    build(CorpusConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), workers=2)
"""
KILLS = 20


def count_files(folder) -> int:
    return sum(not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def make_texts(count: int, *, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = ["".join(rng.sample(SENTENCES, 3)) + str(rng.random()) for _ in range(count)]
    return [*texts, *texts[:40], ""]  # with copies to find


@pytest.fixture
def config(tmp_path, configure) -> CorpusConfig:
    first = write_jsonl(tmp_path / "a.jsonl", make_texts(300, seed=3))
    second = write_jsonl(tmp_path / "b.jsonl", make_texts(100, seed=4), ids=False)
    with open(second, "ab") as stream:
        stream.write(b"broken\n")
    sources = {"a": {"paths": str(first)}, "b": {"paths": str(second), "clean": {"min_chars": 3}}}
    return configure(sources, chunk_mb=0.01, dedup={"near": True})


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, config):
    build(config, tmp_path / "whole", workers=1)
    expected = contents(tmp_path / "whole")
    assert expected.keys() >= {"a.bin", "a.idx", "b.bin", "b.idx", "manifest.json", "dropped.jsonl.zst"}
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    rng = random.Random(7)
    output, attempt, kills, with_parts = tmp_path / "run0", 0, 0, 0
    while kills < KILLS:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "run.py", tmp_path / "config.json", output],
            stderr=subprocess.DEVNULL,
        )
        # Moments are counted in finished files, so that they spread over the work on a slow machine too.
        goal = (count := count_files(output)) + rng.choice([0, 1, 5, 20, 60, 120])
        while process.poll() is None and count < goal:
            time.sleep(0.002)
            count = count_files(output)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            with_parts += bool(list(output.glob(".work/parts/*.json")))
        if (output / "manifest.json").exists():
            build(config, output, workers=1)  # the manifest may be written and .work not yet removed
            assert contents(output) == expected
            attempt += 1
            output = tmp_path / f"run{attempt}"
    build(config, output, workers=2)
    assert contents(output) == expected
    assert with_parts >= 3  # some kills hit the middle of the work


def test_workers_die_with_the_parent(tmp_path, config):
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "config.json", tmp_path / "out"], stderr=subprocess.DEVNULL
    )
    children_file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (children := children_file.read_text().split()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(os.path.exists(f"/proc/{child}") for child in children):
        time.sleep(0.05)  # workers that outlive their parent meet the test's own timeout


def test_full_disk_then_space(tmp_path, config, monkeypatch):
    build(config, tmp_path / "whole", workers=1)

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.os, "copy_file_range", refuse)
        with pytest.raises(UserError, match="no space left on the disk"):
            build(config, tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "a.bin").exists()
    assert not list((tmp_path / "out").glob(".*.partial"))
    build(config, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_file_system_without_copies_in_the_kernel(tmp_path, config, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    build(config, tmp_path / "whole", workers=1)
    monkeypatch.setattr(index.os, "copy_file_range", refuse)
    build(config, tmp_path / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(tmp_path, config, monkeypatch):
    """An output directory with its parts done and nothing merged."""
    with monkeypatch.context() as patch:
        patch.setattr("megatron_medllm.corpus.build.merge_source", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(config, tmp_path / "out", workers=1)
    return tmp_path / "out"


def test_another_tokenizer_is_refused(tmp_path, config, monkeypatch, tokenizer_dir):
    output = interrupted(tmp_path, config, monkeypatch)
    spec = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 400 + len(spec["added_tokens"]), "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    other = config.model_copy(update={"tokenizer": str(tmp_path / "tokenizer.json")})
    with pytest.raises(UserError, match=r"was begun with another tokenizer \(tokenizer\.digest"):
        build(other, output, workers=1)


def test_other_settings_and_changed_input_are_refused(tmp_path, config, monkeypatch):
    output = interrupted(tmp_path, config, monkeypatch)
    other = CorpusConfig.model_validate(config.model_dump() | {"dedup": {"near": True, "threshold": 0.9}})
    with pytest.raises(UserError, match=r"config\.dedup\.threshold: 0\.8 there, 0\.9 now"):
        build(other, output, workers=1)
    build(config, output, workers=1)
    with pytest.raises(UserError, match=r"config\.dedup\.threshold"):
        build(other, output, workers=1)
    with open(tmp_path / "a.jsonl", "ab") as stream:
        stream.write(b'{"text": "more"}\n')
    with pytest.raises(UserError, match=r"inputs\..*a\.jsonl\.bytes"):
        build(config, output, workers=1)


def test_parts_of_another_format_are_not_mixed_in(tmp_path, config, monkeypatch):
    output = interrupted(tmp_path, config, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_medllm.corpus.plan._PARTS_FORMAT", 99)
        with pytest.raises(UserError, match="parts_format: 3 there, 99 now"):
            build(config, output, workers=1)
    build(config, output, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_medllm.corpus.plan._PARTS_FORMAT", 99)
        build(config, output, workers=1)  # of a finished build no parts are left


def test_a_data_set_that_has_changed_is_refused(tmp_path, configure, monkeypatch):
    data = tmp_path / "data" / "train.jsonl"
    data.parent.mkdir()
    write_jsonl(data, SENTENCES)
    config = configure({"s": {"dataset": str(data.parent)}})
    manifest = build(config, tmp_path / "out", workers=1)
    assert list(manifest["inputs"]) == [str(data)]
    with open(data, "ab") as stream:
        stream.write(b'{"text": "more"}\n')
    with pytest.raises(UserError, match=r"inputs\..*train\.jsonl\.bytes"):
        build(config, tmp_path / "out", workers=1)


def test_finished_build_takes_new_weights_only(tmp_path, config):
    before = build(config, tmp_path / "out", workers=1)
    kept = contents(tmp_path / "out")
    assert build(config, tmp_path / "out", workers=1) == before
    sources = config.model_dump()["sources"]
    sources["a"]["weight"], sources["b"]["weight"] = 3.0, 1.0
    after = build(CorpusConfig.model_validate(config.model_dump() | {"sources": sources}), tmp_path / "out", workers=1)
    assert after["sources"]["a"]["weight"] == 0.75
    assert contents(tmp_path / "out")["a.bin"] == kept["a.bin"]


def test_foreign_files_are_not_overwritten(tmp_path, config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"a\.bin: exists"):
        build(config, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"precious"


def test_workers_do_not_change_the_result(tmp_path, config):
    build(config, tmp_path / "one", workers=1)
    build(config, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
