"""`medllm corpus build`: text in, Megatron's indexed data sets out, with an account of every document.

    plan units -> workers: read, clean, decontaminate, sign, tokenize (one part each) -> find copies over all parts
    -> merge the kept documents into PREFIX.bin/.idx -> account

Parts appear whole, and everything after them is a function of the parts: a run killed at any moment goes on from the
parts it has and ends in the same bytes. Parts live in OUTPUT/.work until the manifest is written.
"""

import fcntl
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from megatron_medllm import __version__
from megatron_medllm.account import Account
from megatron_medllm.config.corpus import CorpusConfig, SourceConfig
from megatron_medllm.corpus.blend import add_blend
from megatron_medllm.corpus.dedup import find_copies
from megatron_medllm.corpus.index import bin_path, idx_path, token_dtype
from megatron_medllm.corpus.merge import (
    Part,
    corpus_account,
    load_parts,
    merge_source,
    source_facts,
    write_accounts,
)
from megatron_medllm.corpus.questions import index_questions, load_questions, question_files
from megatron_medllm.corpus.read import read_piece
from megatron_medllm.corpus.summary import write_summary
from megatron_medllm.corpus.tokenizer import TokenizerFacts, choose_backend, describe_tokenizer
from megatron_medllm.corpus.units import Unit, dataset_files, plan_units
from megatron_medllm.corpus.worker import Job, digest_path, encode_fast, run_unit, start_worker
from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.storage import atomic_write, digest_file, full_disk_error, read_json, write_json

MANIFEST = "manifest.json"
WORK = ".work"
_SAMPLE_CHARS = 30_000
# Which setting to look at where most of a source was lost in one way.
_SETTINGS = {
    "no field": "text_field",
    "no column": "text_field",
    "the text is": "text_field",
    "not JSON": "format",
    "expected a JSON object": "format",
    "not ": "encoding",
    "a line longer": "max_document_mb",
    "a value longer": "max_document_mb",
    "a document longer": "max_document_mb",
    "its zstd window": "zstd_window_mb",
    "clean.": "clean",
    "dedup.": ".dedup",
    "decontaminate": ".decontaminate",
}
_PARTS_FORMAT = 3  # raised where a part's bytes change for the same input: parts of two formats do not mix


def build(config: CorpusConfig, output_dir: Path, *, workers: int | None = None, strict: bool = False) -> dict:
    """Build `output_dir`/SOURCE.bin/.idx for every source, and the manifest that describes them.

    Run again after a kill, it finishes; run again after the end, it returns the manifest (with new blend weights, if
    only those have changed).

    Args:
        workers: processes; default: one per core. The result does not depend on it.
        strict: make the first document that cannot be read an error.

    Raises:
        UserError: bad input or config, a full disk, or `output_dir` holds something built otherwise.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(output_dir):
        try:
            return _build(config, output_dir, workers or os.cpu_count() or 1, strict)
        except OSError as error:
            raise full_disk_error(error, output_dir) from error
        except BrokenProcessPool:
            raise UserError(
                "a corpus worker was killed (out of memory?); run the same command again to go on, with fewer --workers"
            ) from None


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    with open(output_dir / ".lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output_dir}: another corpus build is writing here") from None
        yield


def _build(config: CorpusConfig, output_dir: Path, workers: int, strict: bool) -> dict:
    tokenizer = describe_tokenizer(config.tokenizer, kind=config.tokenizer_kind, pattern=config.tiktoken_pattern)
    if config.eod_id >= tokenizer.vocab_size:
        raise UserError(f"eod_id {config.eod_id} is not below the tokenizer's vocabulary size {tokenizer.vocab_size}")
    units, inputs = _plan(config)
    identity = _identity(config, tokenizer, inputs)
    manifest = _open_output(config, output_dir, identity)
    if manifest is None:
        parts = output_dir / WORK / "parts"
        missing = [unit for unit in units if not (parts / f"{unit.name}.json").exists()]
        context = multiprocessing.get_context("spawn")  # tokenizers hold threads that a fork would lose
        job = Job(config, tokenizer, parts, output_dir / WORK / "questions.pickle", strict, os.getpid())
        with ProcessPoolExecutor(max(1, min(workers, len(units))), context, start_worker, (job,)) as pool:
            try:
                sample = _sample(config, units)
                fast = pool.submit(encode_fast, sample)
                if config.decontaminate.exams:
                    questions = index_questions(load_questions(config.decontaminate.exams), config.decontaminate)
                    with atomic_write(job.questions) as stream:
                        pickle.dump(questions, stream)
                backend, why = choose_backend(tokenizer, sample, fast.result)
                _run_units(pool, missing, backend)
                manifest = _assemble(config, output_dir, units, tokenizer)
                manifest["inputs"] = _digests(pool, [Path(p) for p, facts in inputs.items() if "bytes" in facts])
                outputs = [path(output_dir / name) for name in config.sources for path in (bin_path, idx_path)]
                manifest["outputs"] = {Path(p).name: digest for p, digest in _digests(pool, outputs).items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        manifest |= {"built_from": identity, "backend": {"name": backend, "why": why}}
    manifest = add_blend(manifest, config)
    write_summary(output_dir / "summary.html", manifest)
    write_json(output_dir / MANIFEST, manifest)
    shutil.rmtree(output_dir / WORK, ignore_errors=True)
    return manifest


def _plan(config: CorpusConfig) -> tuple[list[Unit], dict[str, dict]]:
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


def _open_output(config: CorpusConfig, output_dir: Path, identity: dict) -> dict | None:
    """Prepare `output_dir`; returns the manifest if it already holds the finished result.

    Raises:
        UserError: it holds something else, finished or not.
    """
    plan = output_dir / WORK / "plan.json"
    manifest = read_json(output_dir / MANIFEST) if (output_dir / MANIFEST).exists() else None
    unfinished = identity | {"parts_format": _PARTS_FORMAT}
    begun = manifest["built_from"] if manifest else read_json(plan) if plan.exists() else None
    if begun is not None:
        _refuse_difference(output_dir, begun, identity if manifest else unfinished)
        for leftover in [*output_dir.glob(".*.partial"), *plan.parent.rglob(".*.partial")]:
            leftover.unlink(missing_ok=True)
        return manifest
    for name in config.sources:
        for path in (bin_path(output_dir / name), idx_path(output_dir / name)):
            if path.exists():
                raise UserError(f"{path}: exists, and no manifest says where it comes from; choose another output")
    (output_dir / WORK / "parts").mkdir(parents=True, exist_ok=True)
    write_json(plan, unfinished)
    return None


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


def _sample(config: CorpusConfig, units: list[Unit]) -> list[str]:
    """The beginnings of the sources, to compare tokenizer libraries on."""
    sample: list[str] = []
    budget = _SAMPLE_CHARS // len(config.sources)
    for name, source in config.sources.items():
        left = budget
        for unit in units:
            if unit.source != name or left <= 0:
                continue
            for text in (text for batch in read_piece(unit.pieces[0], source) for text in batch.texts):
                sample.append(text[:left])
                left -= len(sample[-1])
                if left <= 0:
                    break
            break
    return sample


def _run_units(pool: ProcessPoolExecutor, missing: list[Unit], backend: str) -> None:
    futures = {pool.submit(run_unit, unit, backend): unit for unit in missing}
    total = sum(unit.input_bytes for unit in missing)
    done, tokens, began = 0, 0, time.monotonic()
    with progress("corpus: tokenize (MB)", total=round(total / 1e6, 1)) as bar:
        for future in as_completed(futures):
            tokens += future.result()["tokens"]
            done += futures[future].input_bytes
            elapsed = max(time.monotonic() - began, 1e-3)
            bar.update(round(done / 1e6, 1), f"{done / 1e6 / elapsed:.1f} MB/s, {tokens / 1e6:.1f} M tokens")


def _assemble(config: CorpusConfig, output_dir: Path, units: list[Unit], tokenizer: TokenizerFacts) -> dict:
    """From complete parts to final files; returns the facts of the sources."""
    parts = load_parts(output_dir / WORK / "parts", units)
    copies = find_copies(parts, config)
    dtype = token_dtype(tokenizer.vocab_size)
    sources: dict[str, dict] = {}
    owned: dict[str, list[tuple[int, Part]]] = {}
    for name in config.sources:
        owned[name] = [(number, part) for number, part in enumerate(parts) if part.unit.source == name]
        sources[name] = {"prefix": name, **source_facts(owned[name], copies)}
    write_accounts(output_dir, parts, copies)
    account = corpus_account(sources, parts, copies)
    try:
        _require_sources(account, output_dir)
    except UserError:
        shutil.rmtree(output_dir / WORK)  # what mends it is other input or settings, which these parts do not fit
        raise
    for name, own in owned.items():
        merge_source(output_dir / name, own, copies, dtype)
    return {
        "format": 1,
        "medllm": __version__,
        "dtype": dtype.name,
        "tokens": sum(source["tokens"] for source in sources.values()),
        "documents": sum(source["documents"] for source in sources.values()),
        "tokenizer": {
            "name": config.tokenizer,
            "digest": tokenizer.digest,
            "kind": tokenizer.kind,
            "pattern": tokenizer.pattern,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": config.eod_id,
        },
        "sources": sources,
        "account": account.to_json(),
    }


def _require_sources(account: Account, output_dir: Path) -> None:
    """Refuse a corpus of which a source has kept nothing.

    Raises:
        UserError: names the source, the first loss of the most frequent kind, and the setting that mends it.
    """
    for name, tally in account.subjects.items():
        worst = max(tally.lost, key=lambda kind: tally.lost[kind].count, default="")
        setting = next((setting for kind, setting in _SETTINGS.items() if worst.startswith(kind)), "paths")
        where = setting[1:] if setting.startswith(".") else f"sources.{name}.{setting}"
        listed = f" (all losses: {output_dir / 'dropped.jsonl.zst'})" if tally.lost else ""
        account.require(f"check {where}, or leave the source out{listed}", subject=name)


def _digests(pool: ProcessPoolExecutor, paths: list[Path]) -> dict[str, str]:
    return {str(path): digest for path, digest in zip(paths, pool.map(digest_path, map(str, paths)), strict=True)}
