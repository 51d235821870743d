"""A corpus built by several processes that share a folder: the bytes of one process, whatever is killed."""

import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus import build as building
from megatron_medllm.corpus.build import build, build_shard, finish
from megatron_medllm.corpus.dedup import find_copies
from megatron_medllm.corpus.merge import Part
from megatron_medllm.corpus.plan import WORK, alone, among_shards
from megatron_medllm.corpus.units import InputPiece, Unit
from megatron_medllm.errors import UserError
from megatron_medllm.shard import Shard
from tests.worlds.corpus import SENTENCES, contents, write_jsonl
from tests.worlds.run import run_medllm

SCRIPT = """
import sys
from pathlib import Path
from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.build import build_shard
from megatron_medllm.shard import Shard
if __name__ == "__main__":
    config = CorpusConfig.model_validate_json(Path(sys.argv[1]).read_text())
    build_shard(config, Path(sys.argv[2]), Shard.parse(sys.argv[3]), workers=1)
"""


@pytest.fixture
def config(tmp_path, configure) -> CorpusConfig:
    rng = random.Random(5)
    texts = ["".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(60)) + rng.choice(SENTENCES) for _ in range(500)]
    question = (
        "四十二歳の女性。頸部の腫れを訴えて来院した。甲状腺はびまん性に硬く触れる。この患者にまず行うべき検査はどれか。"
    )
    first = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:30], "", f"過去問。{question}"])  # with copies to find
    second = write_jsonl(tmp_path / "b.jsonl", [*texts[:20], *(text[::-1] for text in texts[:80])], ids=False)
    with open(second, "ab") as stream:
        stream.write(b"broken\n")
    questions = write_jsonl(tmp_path / "exam.jsonl", [question])
    sources = {"a": {"paths": str(first)}, "b": {"paths": str(second), "clean": {"min_chars": 3}}}
    settings = {"dedup": {"near": True}, "decontaminate": {"exams": str(questions)}}
    return configure(sources, chunk_mb=0.01, **settings)


def parts_in(output: Path) -> set[str]:
    return {path.name for path in output.glob(f"{WORK}/parts/[0-9]*.json")}


def test_killed_shards_leave_the_bytes_of_one_process(tmp_path, config):
    build(config, tmp_path / "whole", workers=1)
    output = tmp_path / "out"
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text(config.model_dump_json())

    def start(shard: str) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.json"), str(output), shard]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    # Shard 2 twice: the second start must wait for the first one's units, or find them done.
    running = {name: start(name.split()[0]) for name in ("1/4", "2/4", "3/4", "4/4", "2/4 again")}
    goal = 4
    for name in ("3/4", "1/4", "2/4"):
        while len(parts_in(output)) < goal and running[name].poll() is None:
            time.sleep(0.005)
        running[name].send_signal(signal.SIGKILL)
        running[name].wait()
        goal += 3
    assert len(parts_in(output)) >= 4
    with pytest.raises(UserError, match="another corpus build is writing here"):
        finish(config, output, workers=1)  # while shard 4 runs
    assert [running[name].wait() for name in ("4/4", "2/4 again")] == [0, 0]
    with pytest.raises(UserError, match=r"units are not done, the first of them in .*a\.jsonl; run the shards"):
        finish(config, output, workers=1)
    for shard in ("2/3", "3/3", "1/3"):  # in another number, in another order
        build_shard(config, output, Shard.parse(shard), workers=1)
    finish(config, output, workers=1)
    assert contents(output) == contents(tmp_path / "whole")
    assert not (output / WORK).exists()
    assert build_shard(config, output, Shard(1, 4), workers=1) == []  # nothing to do, nothing left behind
    assert not (output / WORK).exists()


def test_every_unit_belongs_to_one_shard():
    shards = [Shard.parse(f"{index}/3") for index in (1, 2, 3)]
    for number in range(10):
        assert sum(shard.owns(number) for shard in shards) == 1


@pytest.mark.parametrize("text", ["4/3", "0/3", "1/0", "1", "a/b", "1/2/3", "-1/2"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UserError, match=rf"^--shard {text}: expected I/N with I from 1 to N, such as 2/3$"):
        Shard.parse(text)


def test_shards_of_another_configuration_are_refused(tmp_path, config):
    (tmp_path / "out").mkdir()
    with among_shards(tmp_path / "out"):
        build_shard(config, tmp_path / "out", Shard(1, 2), workers=1)
    other = CorpusConfig.model_validate(config.model_dump() | {"dedup": {"near": True, "threshold": 0.9}})
    with pytest.raises(UserError, match=r"config\.dedup\.threshold: 0\.8 there, 0\.9 now"):
        build_shard(other, tmp_path / "out", Shard(2, 2), workers=1)
    with pytest.raises(UserError, match=r"config\.dedup\.threshold"):
        finish(other, tmp_path / "out", workers=1)


def test_another_tokenizer_library_is_refused(tmp_path, config, monkeypatch):
    build_shard(config, tmp_path / "out", Shard(1, 2), workers=1)
    monkeypatch.setattr(building, "choose_backend", lambda *_: ("tokenizers", "fastokens cannot load it: no wheel"))
    with pytest.raises(UserError, match=r"was begun with fastokens, but here it would go on with tokenizers \(fast"):
        build_shard(config, tmp_path / "out", Shard(2, 2), workers=1)


def test_a_shard_does_not_start_beside_a_whole_build(tmp_path, config):
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"), pytest.raises(UserError, match="another corpus build is writing here"):
        build_shard(config, tmp_path / "out", Shard(1, 2), workers=1)


def test_inputs_are_digested_by_the_shards(tmp_path, config, monkeypatch):
    build(config, tmp_path / "whole", workers=1)
    for index in (1, 2):
        build_shard(config, tmp_path / "out", Shard(index, 2), workers=1)
    digested: list[Path] = []
    digest = building.content_digests
    monkeypatch.setattr(building, "content_digests", lambda pool, paths: digested.extend(paths) or digest(pool, paths))
    manifest = finish(config, tmp_path / "out", workers=1)
    assert {path.suffix for path in digested} == {".bin", ".idx"}
    assert manifest["inputs"].keys() == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_copies_over_many_parts_stay_within_the_stated_memory(tmp_path, configure):
    config = configure({"a": {"paths": "a.jsonl"}}, dedup={"near": True})
    parts, per_part, rng = 500, 400, np.random.default_rng(3)
    documents = parts * per_part
    permutations = config.dedup.bands * config.dedup.rows
    owner = np.arange(documents)
    owner[documents // 2 :: 10] -= documents // 2  # a copy of a document that lies in another part
    keys = rng.integers(0, 2**63, (config.dedup.bands, documents), np.uint64)
    sketches = rng.integers(0, 256, (documents, permutations), np.uint8)
    found = []
    for number in range(parts):
        own = slice(number * per_part, (number + 1) * per_part)
        columns = {f"band{band:02d}": keys[band][owner[own]] for band in range(config.dedup.bands)}
        columns |= {"exact0": np.arange(documents, dtype=np.uint64)[own], "exact1": np.zeros(per_part, np.uint64)}
        columns |= {"chars": np.full(per_part, 9, np.uint32), "pieces": np.zeros(per_part, np.int32)}
        np.savez(tmp_path / f"{number:06d}.npz", **columns, lines=np.arange(per_part))
        sketches[owner[own]].tofile(tmp_path / f"{number:06d}.sketch")
        unit = Unit("a", number, (InputPiece("a.jsonl", "jsonl"),))
        found.append(Part(unit, tmp_path / f"{number:06d}", {"documents": per_part}))
    del keys, sketches
    tracemalloc.start()
    try:
        copies = find_copies(found, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    is_copy = owner != np.arange(documents)
    assert (copies.original[is_copy] == owner[is_copy]).all() and (copies.original[~is_copy] == -1).all()
    assert peak <= 100 * documents  # docs/corpus.md


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--shard", "4/3"), "--shard 4/3: expected I/N with I from 1 to N, such as 2/3"),
        (("--shard", "1/2", "--finish"), "--shard 1/2 and --finish: give one of them"),
        (("--finish", "--strict"), "--strict: nothing is read by --finish"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, line):
    status, printed = run_medllm("corpus", "build", tmp_path / "recipe.yaml", *options)
    assert status == 2
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1
