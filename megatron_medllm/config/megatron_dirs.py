"""What a directory is: a checkpoint of Megatron-LM, Megatron-Bridge, NeMo 2 or this package, or none of them.

| | tensors | configuration | tokenizer |
|---|---|---|---|
| Megatron-LM | `iter_*/` (`torch_dist`, or `mp_rank_*` files) | none that is plain data | none |
| Megatron-Bridge | `iter_*/` (`torch_dist`) | `iter_*/run_config.yaml` | `iter_*/tokenizer/` |
| NeMo 2 | `weights/` (`torch_dist`) | `context/model.yaml` | `context/nemo_tokenizer/` |
| this package | the directory itself | `hf/config.json` | `hf/` |

Only names are looked at here, and the tracker file is read, which is text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_medllm.errors import UserError

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RUN_CONFIG_NAME = "run_config.yaml"
_TRACKER_BYTES = 100
_UNFINISHED = "-unfinished"  # NeMo's mark beside a checkpoint that is being written


@dataclass(frozen=True)
class MegatronDir:
    """A Megatron checkpoint: who wrote it, and where its parts are."""

    writer: Literal["medllm", "megatron-lm", "bridge", "nemo"]
    weights: Path  # the folder with the tensors
    is_legacy: bool  # one file a rank, `mp_rank_*`; else a distributed checkpoint
    config: Path | None  # run_config.yaml or context/model.yaml
    tokenizer: Path | None  # folder with tokenizer.json

    def files(self) -> Iterator[Path]:
        """Every file that the model's tensors depend on."""
        yield from sorted(path for path in self.weights.rglob("*") if path.is_file())
        if self.config is not None and self.config.parent != self.weights:
            yield self.config


def find_megatron(path: Path) -> MegatronDir | None:
    """The Megatron checkpoint at `path`: its root, its iteration's folder or its folder of weights. None: no such.

    Raises:
        UserError: a root whose tracker names no folder, or that holds several iterations and no tracker; a checkpoint
            that was not finished.
    """
    if not path.is_dir():
        return None
    if path.with_name(path.name + _UNFINISHED).exists():
        raise UserError(f"{path}: {path.name}{_UNFINISHED} beside it says that it was not written to its end")
    if (path / "hf" / "config.json").is_file() and (path / "metadata.json").is_file():
        return MegatronDir("medllm", path, False, None, path / "hf")
    for root, weights in ((path, path / "weights"), (path.parent, path), (path, path)):
        if weights.name != "weights" and root != weights:
            continue
        if (root / "context").is_dir() and (weights / "metadata.json").is_file():
            return _nemo(root / "context", weights)
    folder = _iteration(path)
    is_legacy = any(folder.glob("mp_rank_*"))
    if not is_legacy and not (folder / "metadata.json").is_file():
        if folder != path:
            raise UserError(f"{folder}: neither metadata.json nor mp_rank_* folders: no Megatron checkpoint")
        return None
    config, tokenizer = folder / RUN_CONFIG_NAME, folder / "tokenizer"
    if not config.is_file():
        return MegatronDir("megatron-lm", folder, is_legacy, None, None)
    return MegatronDir("bridge", folder, is_legacy, config, _tokenizer(tokenizer))


def _nemo(context: Path, weights: Path) -> MegatronDir:
    config = context / "model.yaml"
    return MegatronDir(
        "nemo", weights, False, config if config.is_file() else None, _tokenizer(context / "nemo_tokenizer")
    )


def _tokenizer(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer.json").is_file() else None


def _iteration(path: Path) -> Path:
    """The folder of the iteration that a root's tracker names; `path` itself where it is no root."""
    tracker = path / TRACKER_NAME
    if not tracker.is_file():
        found = sorted(folder for folder in path.glob("iter_*") if folder.is_dir())
        if len(found) > 1:
            names = ", ".join(folder.name for folder in found[:4])
            raise UserError(f"{path}: no {TRACKER_NAME}; name one of its iterations ({names})")
        return found[0] if found else path
    with open(tracker, "rb") as stream:
        text = stream.read(_TRACKER_BYTES).decode("utf-8", "replace").strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise UserError(f"{tracker}: expected a number or 'release', found {text[:40]!r}")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise UserError(f"{tracker}: names {folder.name}, which is not there")
    return folder
