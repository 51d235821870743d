"""Nothing in another tool's checkpoint is run, wherever it keeps pickles; and its files are not loaded whole."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.errors import UserError
from tests.worlds import peers
from tests.worlds.model_dir import assert_same_tensors, read_tensors, twin_shape, write_twin

UNTIED = twin_shape("7b", layers=4)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return write_twin(tmp_path / "hf", UNTIED)


class Attack:
    """Unpickling this makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


HOSTILE = """
import sys
from pathlib import Path
import megatron.core  # registers classes that torch would then trust
import torch
torch.serialization.add_safe_globals([__import__("os").mkdir])  # the worst that an import could have done
from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.errors import UserError
try:
    export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), source_dir=Path(sys.argv[3]))
except UserError as error:
    print("refused", error)
else:
    print("exported")
"""


def hostile_export(checkpoint: Path, hf_dir: Path) -> str:
    """Export in a process where everything is imported and trusted that can be."""
    command = [sys.executable, "-c", HOSTILE, str(checkpoint), str(checkpoint) + "-out", str(hf_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "place", ["common.pt", "model_optim_rng.pt", ".metadata", "rng_state", "common_state", "tensor"]
)
def test_pickles_are_never_run(untied: Path, tmp_path: Path, place: str):
    """Wherever the peers keep pickles: the checkpoint is read without it, or refused; either way nothing runs."""
    victim, tensors, attack = tmp_path / "ran", peers.whole(untied), Attack(tmp_path / "ran")
    root = tmp_path / "mlm"
    if place == "model_optim_rng.pt":
        peers.write_legacy(root, tensors, UNTIED, change=lambda state: state.update(rng_state=attack, hook=attack))
    else:
        key = {"rng_state": "rng_state/shard_0.0_1.1", "common_state": "common_state/shard_0_1"}.get(place)
        peers.write_dist(root, tensors, objects={key: peers.pickled(attack)} if key else None)
    if place == "common.pt":
        torch.save(attack, root / "common.pt")
    if place == ".metadata":
        (root / ".metadata").write_bytes(pickle.dumps(attack))
    if place == "tensor":
        data = root / "__0_0.distcp"
        bytes_ = peers.pickled(attack)
        data.write_bytes(bytes_ + data.read_bytes()[len(bytes_) :])
    told = hostile_export(root, untied)
    assert not victim.exists()
    if place in (".metadata", "tensor"):
        assert told.startswith("refused")
    else:
        assert told == "exported"
        assert_same_tensors(read_tensors(Path(f"{root}-out")), read_tensors(untied))


def test_the_attack_would_work(tmp_path: Path):
    with open(tmp_path / "x.pt", "wb") as stream:
        stream.write(peers.pickled(Attack(tmp_path / "ran")))
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_yaml_tags_are_not_followed(untied: Path, tmp_path: Path):
    root = peers.write_nemo(tmp_path / "nemo", peers.whole(untied), UNTIED)
    (root / "context" / "model.yaml").write_text(f"config: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    with pytest.raises(UserError, match=r"model.yaml: not plain YAML: could not determine a constructor"):
        export_checkpoint(root, tmp_path / "out", source_dir=untied)
    assert not (tmp_path / "ran").exists()


MEASURED = """
import re, sys
from pathlib import Path
from megatron_medllm.checkpoint.convert import export_checkpoint
# Not ru_maxrss: a child inherits that of the process it was forked from.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), source_dir=Path(sys.argv[3]))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path):
    """400 MB in tensors of up to 100 MB, of which no more than runs of rows are in memory at once."""
    shape = UNTIED.model_copy(
        update={"num_layers": 1, "hidden_size": 1024, "vocab_size": 50_000, "tie_embeddings": False}
    )
    shape = shape.model_copy(update={"num_attention_heads": 16, "num_query_groups": 2, "ffn_hidden_size": 33_000})
    hf_dir = write_twin(tmp_path / "hf", shape)
    peers.write_legacy(tmp_path / "mlm", peers.whole(hf_dir), shape, tp=2)
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("mlm", "out", "hf"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(hf_dir))
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 250, f"{grown} MiB"
