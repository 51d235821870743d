"""`medllm corpus build`: text in, Megatron's indexed data sets out, with an account of every document.

    plan units -> workers: read, clean, decontaminate, sign, tokenize (one part each) -> find copies over all parts
    -> merge the kept documents into PREFIX.bin/.idx -> account

Several processes may share the units (`build_shard`), one does the rest (`finish`). Parts appear whole, and everything
after them is a function of the parts: a run killed at any moment goes on from the parts it has and ends in the same
bytes. Parts live in OUTPUT/.work until the manifest is written.
"""

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
from megatron_medllm.config.corpus import CorpusConfig
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
from megatron_medllm.corpus.plan import MANIFEST, Plan, alone, among_shards, one_at_a_time, open_output, plan_corpus
from megatron_medllm.corpus.questions import index_questions, load_questions
from megatron_medllm.corpus.read import read_piece
from megatron_medllm.corpus.summary import write_summary
from megatron_medllm.corpus.tokenizer import choose_backend
from megatron_medllm.corpus.units import Unit
from megatron_medllm.corpus.worker import QUESTIONS, Job, digest_path, encode_fast, run_unit, start_worker
from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.shard import Shard
from megatron_medllm.storage import atomic_write, full_disk_error, read_json, write_json

DIGESTS = "digests"
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


def build(config: CorpusConfig, output_dir: Path, *, workers: int | None = None, strict: bool = False) -> dict:
    """Build `output_dir`/SOURCE.bin/.idx for every source, and the manifest that describes them.

    Run again after a kill, it finishes; run again after the end, it returns the manifest (with new blend weights, if
    only those have changed).

    Args:
        workers: processes; default: one per core that this process may use. The result does not depend on it.
        strict: make the first document that cannot be read an error.

    Raises:
        UserError: bad input or config, a full disk, or `output_dir` holds something built otherwise.
    """
    with _reporting(output_dir), alone(output_dir):
        plan = plan_corpus(config, output_dir)
        return _finished(plan, open_output(plan), workers, strict)


def build_shard(
    config: CorpusConfig, output_dir: Path, shard: Shard, *, workers: int | None = None, strict: bool = False
) -> list[Unit]:
    """Make the parts of one shard's units in `output_dir`, which all shards share; `finish` makes the result of all.

    Shards may run at the same time or one after the other, on any host that sees `output_dir` and the inputs, and may
    be killed and run again. Their number may change: what is done stays done.

    Returns:
        The units that this call had to do.

    Raises:
        UserError: as `build`; also, that the tokenizer library chosen here is not the one that other shards use.
    """
    with _reporting(output_dir), among_shards(output_dir):
        plan = plan_corpus(config, output_dir)
        if not (output_dir / MANIFEST).exists():
            with one_at_a_time(output_dir):
                open_output(plan, shared=True)
            mine = [unit for unit in plan.missing() if shard.owns(unit.number)]
            with _workers(plan, len(mine), workers, strict) as pool:
                backend, _ = _prepare(plan, pool)
                _run_units(pool, mine, backend)
                files = [path for number, path in enumerate(plan.files) if shard.owns(number)]
                write_json(shard.file(plan.work / DIGESTS / "inputs.json"), _digest_inputs(plan, pool, files))
            return mine
        open_output(plan, shared=True)
        return []


def finish(config: CorpusConfig, output_dir: Path, *, workers: int | None = None) -> dict:
    """Build the result from the parts of all shards; the same as `build`'s, which it ends as.

    Raises:
        UserError: as `build`, or a unit's part is missing.
    """
    with _reporting(output_dir), alone(output_dir):
        plan = plan_corpus(config, output_dir)
        manifest = open_output(plan)
        if manifest is None and (missing := plan.missing()):
            first = missing[0].pieces[0]
            raise UserError(
                f"{output_dir}: {len(missing)} of {len(plan.units)} units are not done, the first of them in "
                f"{first.path}; run the shards that were killed or never started again"
            )
        return _finished(plan, manifest, workers, strict=False)


@contextmanager
def _reporting(output_dir: Path) -> Iterator[None]:
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        raise full_disk_error(error, output_dir) from error
    except BrokenProcessPool:
        raise UserError(
            "a corpus worker was killed (out of memory?); run the same command again to go on, with fewer --workers"
        ) from None


def _finished(plan: Plan, manifest: dict | None, workers: int | None, strict: bool) -> dict:
    output_dir, config = plan.output_dir, plan.config
    if manifest is None:
        with _workers(plan, len(plan.units), workers, strict) as pool:
            backend, why = _prepare(plan, pool)
            _run_units(pool, plan.missing(), backend)
            manifest = _assemble(plan)
            manifest["inputs"] = _digest_inputs(plan, pool, plan.files)
            outputs = [path(output_dir / name) for name in config.sources for path in (bin_path, idx_path)]
            manifest["outputs"] = {Path(p).name: digest for p, digest in content_digests(pool, outputs).items()}
        manifest |= {"built_from": plan.identity, "backend": {"name": backend, "why": why}}
    manifest = add_blend(manifest, config)
    write_summary(output_dir / "summary.html", manifest)
    write_json(output_dir / MANIFEST, manifest)
    shutil.rmtree(plan.work, ignore_errors=True)
    return manifest


@contextmanager
def _workers(plan: Plan, units: int, workers: int | None, strict: bool) -> Iterator[ProcessPoolExecutor]:
    """Processes that have the tokenizer loaded, no more than there are units to do."""
    context = multiprocessing.get_context("spawn")  # tokenizers hold threads that a fork would lose
    job = Job(plan.config, plan.tokenizer, plan.parts, strict, os.getpid())
    count = max(1, min(workers or len(os.sched_getaffinity(0)), units))  # Slurm gives a task some of a node's cores
    with ProcessPoolExecutor(count, context, start_worker, (job,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare(plan: Plan, pool: ProcessPoolExecutor) -> tuple[str, str]:
    """Choose the tokenizer library, and why, while the workers start; index the exam questions for them.

    Raises:
        UserError: parts were made here with another library, whose ids may differ beyond the sample.
    """
    sample = _sample(plan.config, plan.units)
    fast = pool.submit(encode_fast, sample)
    decontaminate, questions = plan.config.decontaminate, None
    if decontaminate.exams:
        questions = index_questions(load_questions(decontaminate.exams), decontaminate)
    backend, why = choose_backend(plan.tokenizer, sample, fast.result)
    with one_at_a_time(plan.output_dir):
        if questions is not None:
            with atomic_write(plan.parts / QUESTIONS) as stream:
                pickle.dump(questions, stream)
        chosen = plan.work / "backend.json"
        if not chosen.exists():
            write_json(chosen, {"name": backend, "why": why})
        begun = read_json(chosen)
    if begun["name"] != backend:
        raise UserError(
            f"{plan.output_dir}: was begun with {begun['name']}, but here it would go on with {backend} ({why}); "
            "install the same packages, or delete this directory to start over"
        )
    return backend, why


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


def _assemble(plan: Plan) -> dict:
    """From complete parts to final files; returns the facts of the sources."""
    config, output_dir, tokenizer = plan.config, plan.output_dir, plan.tokenizer
    parts = load_parts(plan.parts, plan.units)
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
        shutil.rmtree(plan.work)  # what mends it is other input or settings, which these parts do not fit
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


def _digest_inputs(plan: Plan, pool: ProcessPoolExecutor, paths: list[Path]) -> dict[str, str]:
    """Digests of input files, by path; those that a shard has left are not made again."""
    known: dict[str, str] = {}
    for left in sorted((plan.work / DIGESTS).glob("*.json")):
        known |= read_json(left)
    known |= content_digests(pool, [path for path in paths if str(path) not in known])
    return {str(path): known[str(path)] for path in paths}


def content_digests(pool: ProcessPoolExecutor, paths: list[Path]) -> dict[str, str]:
    return {str(path): digest for path, digest in zip(paths, pool.map(digest_path, map(str, paths)), strict=True)}
