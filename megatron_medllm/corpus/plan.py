"""What a corpus is built from, cut into units, and the output directory that several processes may share.

Everything here is the same in every process that works on one corpus, on whatever host: the units, their order, and
the identity that says which parts fit together.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_medllm.config.corpus import CorpusConfig, SourceConfig
from megatron_medllm.corpus.index import bin_path, idx_path
from megatron_medllm.corpus.questions import question_files
from megatron_medllm.corpus.tokenizer import TokenizerFacts, describe_tokenizer
from megatron_medllm.corpus.units import Unit, dataset_files, plan_units
from megatron_medllm.errors import UserError
from megatron_medllm.storage import digest_file, read_json, write_json

MANIFEST = "manifest.json"
WORK = ".work"
_PARTS_FORMAT = 3  # raised where a part's bytes change for the same input: parts of two formats do not mix


def parts_folder(output_dir: Path) -> Path:
    """Where the parts of a corpus lie while it is built."""
    return output_dir / WORK / "parts"


@dataclass(frozen=True)
class Plan:
    """One corpus to build. `inputs` holds size and time of every input file, `identity` what the bytes depend on."""

    config: CorpusConfig
    output_dir: Path
    tokenizer: TokenizerFacts
    units: list[Unit]
    inputs: dict[str, dict]
    identity: dict

    @property
    def work(self) -> Path:
        """What lies here is gone once the corpus is finished."""
        return self.output_dir / WORK

    @property
    def parts(self) -> Path:
        """Where units become parts."""
        return parts_folder(self.output_dir)

    @property
    def files(self) -> list[Path]:
        """The input files; not those on the hub, whose name tells all."""
        return [Path(path) for path, facts in self.inputs.items() if "bytes" in facts]

    def missing(self) -> list[Unit]:
        """The units that no process has finished."""
        # Listing a folder asks a network file system anew; a name that was not there a moment ago, it may remember.
        done = set(os.listdir(self.parts)) if self.parts.is_dir() else set()
        return [unit for unit in self.units if f"{unit.name}.json" not in done]


def plan_corpus(config: CorpusConfig, output_dir: Path) -> Plan:
    """Find the inputs and cut them.

    Raises:
        UserError: no such input or tokenizer, or an `eod_id` that the tokenizer does not have.
    """
    tokenizer = describe_tokenizer(config.tokenizer, kind=config.tokenizer_kind, pattern=config.tiktoken_pattern)
    if config.eod_id >= tokenizer.vocab_size:
        raise UserError(f"eod_id {config.eod_id} is not below the tokenizer's vocabulary size {tokenizer.vocab_size}")
    units, inputs = _units(config)
    return Plan(config, output_dir, tokenizer, units, inputs, _identity(config, tokenizer, inputs))


@contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Hold the output directory against every other process.

    Raises:
        UserError: another one builds here, or a shard of it.
    """
    with _locked(output_dir / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def among_shards(output_dir: Path) -> Iterator[None]:
    """Hold the output directory together with other shards.

    Raises:
        UserError: a process that is no shard builds here.
    """
    with _locked(output_dir / ".lock", fcntl.LOCK_SH | fcntl.LOCK_NB):
        yield


@contextmanager
def one_at_a_time(output_dir: Path) -> Iterator[None]:
    """Wait for the other shards' turns, within `among_shards`: for the little that all of them write."""
    (output_dir / WORK).mkdir(exist_ok=True)
    with _locked(output_dir / WORK / "turn.lock", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with open(path, "a+b") as lock:  # NFS wants it open for reading and writing, for shared and for exclusive locks
        try:
            fcntl.flock(lock, how)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another corpus build is writing here") from None
        yield


def open_output(plan: Plan, *, shared: bool = False) -> dict | None:
    """Prepare the output directory; returns the manifest if it already holds the finished result.

    Args:
        shared: other shards may be writing here now.

    Raises:
        UserError: it holds something else, finished or not.
    """
    began = plan.work / "plan.json"
    path = plan.output_dir / MANIFEST
    manifest: dict | None = read_json(path) if path.exists() else None
    unfinished = plan.identity | {"parts_format": _PARTS_FORMAT}
    begun = manifest["built_from"] if manifest else read_json(began) if began.exists() else None
    if begun is not None:
        _refuse_difference(plan.output_dir, begun, plan.identity if manifest else unfinished)
        if not shared:
            for leftover in [*plan.output_dir.glob(".*.partial"), *plan.work.rglob(".*.partial")]:
                leftover.unlink(missing_ok=True)
        return manifest
    for name in plan.config.sources:
        for path in (bin_path(plan.output_dir / name), idx_path(plan.output_dir / name)):
            if path.exists():
                raise UserError(f"{path}: exists, and no manifest says where it comes from; choose another output")
    plan.parts.mkdir(parents=True, exist_ok=True)
    write_json(began, unfinished)
    return None


def _units(config: CorpusConfig) -> tuple[list[Unit], dict[str, dict]]:
    """All units, and the size and time of every input file; nothing of a file on the hub, whose name tells all."""
    units: list[Unit] = []
    for name, source in config.sources.items():
        units += plan_units(name, source, first_number=len(units), chunk_bytes=max(1, int(config.chunk_mb * 1e6)))
    inputs: dict[str, dict] = {}
    for name, source in config.sources.items():
        pieces = (piece.path for unit in units if unit.source == name for piece in unit.pieces)
        for path in dataset_files(source) if source.dataset else dict.fromkeys(pieces):
            inputs.setdefault(path, {"source": name})
            if os.path.exists(path):
                stat = os.stat(path)
                inputs[path] |= {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return units, inputs


def _identity(config: CorpusConfig, tokenizer: TokenizerFacts, inputs: dict[str, dict]) -> dict:
    """What the bytes of the result depend on: equal identities may share parts."""
    settings = config.model_dump(mode="json", exclude={"tokenizer", "split", "replay_share", "token_budget"})
    for source in settings["sources"].values():
        for blend_only in ("weight", "replay", "licence"):
            del source[blend_only]
        for later in ("encoding", "max_document_mb", "zstd_window_mb"):  # finished corpora of before stay what they are
            if source[later] == SourceConfig.model_fields[later].default:
                del source[later]
    facts = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind}
    exams = {str(path): digest_file(path) for path in question_files(config.decontaminate.exams)}
    return {"tokenizer": facts, "config": settings, "inputs": inputs, "exams": exams}


def _refuse_difference(output_dir: Path, begun: dict, identity: dict) -> None:
    difference = _first_difference(begun, identity)
    if difference is None:
        return
    where, old, new = difference
    what = "another tokenizer" if where.startswith("tokenizer") else "other input or settings"
    raise UserError(
        f"{output_dir}: was begun with {what} ({where}: {old} there, {new} now); "
        "choose another output, or delete this one to start over"
    )


def _first_difference(old: object, new: object, where: str = "") -> tuple[str, object, object] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    return None if old == new else (where, old, new)
