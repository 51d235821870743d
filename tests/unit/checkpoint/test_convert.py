"""HF -> distributed checkpoint -> HF: the same bytes for every size, after kills, and damage that is named."""

import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_medllm.checkpoint.convert import export_checkpoint, import_hf
from megatron_medllm.checkpoint.journal import Journal
from megatron_medllm.checkpoint.torch_dist import TorchDistReader, refuse_unsafe
from megatron_medllm.errors import UserError
from tests.worlds.model_dir import PUBLISHED, assert_same_tensors, read_tensors, twin_shape, write_twin

SHAPE = twin_shape("7b", layers=3)
TINY_CHUNKS = 3000  # bytes: even these models are cut into many chunks


def tree_digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("size", PUBLISHED)
def test_round_trip_is_bitwise(tmp_path: Path, size: str):
    hf_dir = write_twin(tmp_path / "hf", twin_shape(size))
    import_hf(hf_dir, tmp_path / "ckpt", chunk_bytes=TINY_CHUNKS)
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_dir))
    assert not list(tmp_path.glob(".*"))


def test_round_trip_with_a_padded_ffn(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    ffn = SHAPE.ffn_hidden_size
    import_hf(hf_dir, tmp_path / "ckpt", chunk_bytes=TINY_CHUNKS, ffn_hidden_size=ffn + 40)
    reader = TorchDistReader(tmp_path / "ckpt")
    assert reader.shape_of("decoder.layers.mlp.linear_fc1.weight") == (3, 2 * (ffn + 40), 112)
    assert reader.shape_of("decoder.layers.mlp.linear_fc2.weight") == (3, 112, ffn + 40)
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_dir))


def test_dtype_choice_rounds_once(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE, dtype=torch.float32)
    import_hf(hf_dir, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in read_tensors(hf_dir).items()}
    assert_same_tensors(read_tensors(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def small_tokenizer(directory: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {letter: n for n, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)


def test_exported_directory_generates_in_transformers(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    small_tokenizer(hf_dir)
    (hf_dir / "generation_config.json").write_text('{"eos_token_id": 0, "max_new_tokens": 5, "do_sample": false}')
    import_hf(hf_dir, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back", shard_bytes=60_000)
    shards = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    texts = []
    for directory in (hf_dir, tmp_path / "back"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        ids = tokenizer("心不全", return_tensors="pt")["input_ids"]
        texts.append(model.generate(ids)[0].tolist())
        assert len(texts[-1]) > ids.shape[1]
    assert texts[0] == texts[1]


def test_config_is_readable_by_transformers_4_and_5(tmp_path: Path):
    """5 reads 4's spelling; 4 does not know 5's `rope_parameters` and would fall back to base 10,000."""
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    config = json.loads((hf_dir / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["dtype"] = config.pop("torch_dtype")
    (hf_dir / "config.json").write_text(json.dumps(config))
    import_hf(hf_dir, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["rope_theta"] == 1_000_000.0
    assert written["torch_dtype"] == "bfloat16"
    assert not {"rope_parameters", "dtype"} & written.keys()
    assert written["eos_token_id"] == 0  # carried along
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.rope_parameters["rope_theta"] == 1e6


# Runs in a process of its own: forks, converts in the child, kills it, again and again: in turn shortly after its
# start and shortly after it has finished a part, so that there are many kills on a fast disk and an end on a slow one.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from megatron_medllm.checkpoint.convert import export_checkpoint, import_hf

hf, ckpt, back = map(Path, sys.argv[1:4])
jobs = [(ckpt, lambda: import_hf(hf, ckpt, chunk_bytes=3000)), (back, lambda: export_checkpoint(ckpt, back))]
kills = 0
dice = random.Random(0)

def written(path):
    return path.stat().st_size if path.exists() else 0

for target, work in jobs:
    journal = target.with_name(f".{target.name}.partial") / "journal.jsonl"
    attempt = 0
    while not target.exists():
        attempt += 1
        before = written(journal)
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        while attempt % 2 and written(journal) == before and not target.exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(kills)
"""


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path):
    hf_dir = write_twin(tmp_path / "hf", twin_shape("1.5b", layers=8))
    paths = [str(hf_dir), str(tmp_path / "killed"), str(tmp_path / "killed_back")]
    command = [sys.executable, "-c", KILLS, *paths]
    environment = os.environ | {"MEDLLM_PROGRESS_FILE": str(tmp_path / "progress.json"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 10
    import_hf(hf_dir, tmp_path / "straight", chunk_bytes=3000)
    export_checkpoint(tmp_path / "straight", tmp_path / "straight_back")
    assert tree_digests(tmp_path / "killed") == tree_digests(tmp_path / "straight")
    assert tree_digests(tmp_path / "killed_back") == tree_digests(tmp_path / "straight_back")


def test_journal_drops_a_torn_line_and_another_jobs_work(tmp_path: Path):
    first = Journal(tmp_path / "work", {"job": 1})
    first.record("a", 1)
    with pytest.raises(UserError, match="another process is writing here"):
        Journal(tmp_path / "work", {"job": 1})
    first.close()
    with open(tmp_path / "work/journal.jsonl", "ab") as stream:
        stream.write(b'{"part": "b", "resu')
    second = Journal(tmp_path / "work", {"job": 1})
    assert second.done == {"a": 1}
    second.record("b", 2)
    second.close()
    (tmp_path / "work/stale").write_text("of the other job")
    other = Journal(tmp_path / "work", {"job": 2})
    assert other.done == {}
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["journal.jsonl"]
    other.close()


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    import_hf(write_twin(tmp_path / "hf", SHAPE), tmp_path / "ckpt", chunk_bytes=TINY_CHUNKS)
    return tmp_path / "ckpt"


def test_flipped_byte_in_a_checkpoint_is_named(ckpt: Path, tmp_path: Path):
    flip_byte(ckpt / "__0_2.distcp", 20_000)
    with pytest.raises(UserError, match=r"__0_2.distcp: 'decoder.layers.*' at \[1, .*does not match its digest"):
        export_checkpoint(ckpt, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_flipped_byte_in_an_exported_shard_is_named(ckpt: Path, tmp_path: Path):
    export_checkpoint(ckpt, tmp_path / "back")
    flip_byte(tmp_path / "back/model.safetensors", 100_000)
    with pytest.raises(UserError, match=r"model.safetensors: tensor 'model.layers.*' does not match its digest"):
        import_hf(tmp_path / "back", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_flipped_byte_in_a_training_checkpoint_is_named(ckpt: Path, tmp_path: Path):
    """Training records one digest a file, under the names that `train.state` uses."""
    (ckpt / "tensor_digests.json").unlink()
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in ckpt.glob("*.distcp")}
    (ckpt / "digests.json").write_text(json.dumps(digests))
    export_checkpoint(ckpt, tmp_path / "back")
    flip_byte(ckpt / "__0_1.distcp", 999)
    with pytest.raises(UserError, match=r"__0_1.distcp: does not match its digest"):
        export_checkpoint(ckpt, tmp_path / "back2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "__0_1.distcp").unlink(), r"__0_1.distcp: no such file, though .metadata names it"),
        (lambda d: os.truncate(d / "__0_1.distcp", 5000), r"__0_1.distcp: truncated inside 'decoder.layers"),
        (lambda d: (d / ".metadata").unlink(), r".metadata: no such file"),
        (lambda d: os.truncate(d / ".metadata", 500), r".metadata: "),
        (lambda d: (d / "metadata.json").unlink(), r"ckpt: not a distributed checkpoint"),
        (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'), r"'zarr'; only 'torch_dist'"),
    ],
    ids=["missing file", "truncated file", "no metadata", "torn metadata", "no format", "other format"],
)
def test_damaged_checkpoint(ckpt: Path, tmp_path: Path, damage, message: str):
    damage(ckpt)
    with pytest.raises(UserError, match=message):
        export_checkpoint(ckpt, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_checkpoint_of_another_model(ckpt: Path, tmp_path: Path):
    other = write_twin(tmp_path / "other", twin_shape("14b", layers=3))
    with pytest.raises(UserError, match=r"tensor 'embedding.word_embeddings.weight' of shape \[307, 112\] is another"):
        export_checkpoint(ckpt, tmp_path / "back", source_dir=other)


class Attack:
    """Unpickling this runs a command."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


def test_metadata_that_would_run_code(ckpt: Path, tmp_path: Path):
    (ckpt / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(UserError, match=r".metadata: not the metadata .*: refers to posix.system"):
        refuse_unsafe(ckpt)
    assert not (tmp_path / "ran").exists()


def test_stored_object_that_would_run_code(ckpt: Path, tmp_path: Path):
    refuse_unsafe(ckpt)
    stream = io.BytesIO()
    torch.save(Attack(tmp_path / "ran"), stream)
    (ckpt / "tensor_digests.json").unlink()  # an attacker would leave out the digests
    objects = ckpt / "__0_6.distcp"
    original = objects.read_bytes()
    objects.write_bytes(stream.getvalue() + original[len(stream.getvalue()) :])
    with pytest.raises(UserError, match=r"__0_6.distcp: cannot read 'decoder.layers.*_extra_state"):
        refuse_unsafe(ckpt)
    assert not (tmp_path / "ran").exists()


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["os.fdatasync", "os.posix_fallocate", "os.pwrite"])
def test_full_disk(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    monkeypatch.setattr(call, no_space)
    with pytest.raises(UserError, match="no space left on the disk"):
        export_checkpoint(ckpt, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    monkeypatch.undo()
    export_checkpoint(ckpt, tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "hf"))


def test_full_disk_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hf_dir = write_twin(tmp_path / "hf", SHAPE)
    monkeypatch.setattr("os.fdatasync", no_space)
    with pytest.raises(UserError, match="no space left on the disk"):
        import_hf(hf_dir, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_existing_results_are_not_overwritten(ckpt: Path, tmp_path: Path):
    with pytest.raises(UserError, match="ckpt: already exists"):
        import_hf(tmp_path / "hf", ckpt)
    with pytest.raises(UserError, match="hf: already exists"):
        export_checkpoint(ckpt, tmp_path / "hf")


def test_a_source_of_another_family_is_refused(tmp_path: Path):
    """Qwen3's head norms would be dropped, or Qwen2.5's biases."""
    twins = {name: twin_shape(name) for name in ("qwen3-8b", "7b")}
    for name, shape in twins.items():
        import_hf(write_twin(tmp_path / name, shape), tmp_path / f"{name}.ckpt", chunk_bytes=TINY_CHUNKS)
    for name, other, has in (("qwen3-8b", "7b", "has"), ("7b", "qwen3-8b", "lacks")):
        with pytest.raises(UserError, match=f"{has} norms on queries and keys, unlike the source's Qwen"):
            export_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / "out", source_dir=tmp_path / other)
