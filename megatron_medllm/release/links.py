"""Does each stage of the chain come from the one before it? What the stages recorded of their inputs is compared.

A digest of every file says that nothing has changed since the release. It does not say that the pairs are those that
the model was trained on: they may have been sampled again before. The records say it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_medllm.config.hf_files import digested_files
from megatron_medllm.errors import UserError
from megatron_medllm.inference.model_files import model_digest
from megatron_medllm.release.chain import exam_summary
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.storage import digest_value, read_json


def check_links(run: FinishedRun, digests: Mapping[Path, str]) -> list[str]:
    """Compare what is on record.

    Args:
        digests: SHA-256 of the chain's files.

    Returns:
        what could not be compared, in words.

    Raises:
        UserError: names the first stage that was made from something else.
    """
    untold = _check_records(run)
    for training in run.lineage():
        suffix, start = run.round_suffix(training), run.start(training)
        if suffix is None:
            continue
        if run.config.pairs is not None:
            untold += _check_pairs(run.directory / f"pairs{suffix}", start, digests)
        key = read_json(run.directory / f"reference{suffix}" / "key.json")
        weights = None if start is None else weights_digest(start, digests)
        untold += _same(weights, key["weights"], f"reference{suffix}", f"was scored by another model than {start}")
    examined = exam_summary(run)["provenance"].get("model_digest")
    found = None if examined is None else model_digest(run.model_dir)
    return untold + _same(found, examined, "exam", f"was sat by another model than {run.model_dir}")


def _check_pairs(folder: Path, start: Path | None, digests: Mapping[Path, str]) -> list[str]:
    manifest, stage = read_json(folder / "manifest.json"), folder.name
    if digests[folder / "pairs.jsonl"] != manifest["digest"]:
        raise UserError(f"chain: stage {stage}: pairs.jsonl is not what its manifest.json describes")
    if "provenance" not in manifest:  # nothing was sampled
        return []
    sampled = manifest["provenance"].get("model_digest")
    found = None if sampled is None or start is None else model_digest(start)
    return _same(found, sampled, stage, f"was sampled from another model than {start}")


def _same(found: str | None, recorded: str | None, stage: str, otherwise: str) -> list[str]:
    if found is None or recorded is None:
        return [f"{stage}: no digest of its model is on record"]
    if found != recorded:
        raise UserError(f"chain: stage {stage} {otherwise}; run medllm pipeline again")
    return []


def weights_digest(hf_dir: Path, digests: Mapping[Path, str]) -> str | None:
    """What `medllm score` records of an HF directory's weights, from digests of its files; None where they lack.

    (`train.reference.digest_weights` reads the files, and stands behind all of Megatron-Core.)
    """
    paths = [hf_dir / name for name in digested_files(hf_dir)]
    return digest_value({path.name: digests[path] for path in paths}) if all(p in digests for p in paths) else None


def _check_records(run: FinishedRun) -> list[str]:
    """Each record of the pipeline holds the keys of the stages before it."""
    folder = run.directory / "stages"
    waiting = [name for name in (run.model, f"eval-{run.model}") if (folder / f"{name}.json").is_file()]
    if not waiting:
        return ["stages: medllm pipeline keeps no record of this run"]
    seen: dict[str, dict[str, Any]] = {}

    def record(name: str, needed_by: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise UserError(f"chain: stage {name} is missing ({path} is gone); {needed_by} was made from it")
        found = read_json(path)
        if found.get("status") != "done":
            raise UserError(f"chain: stage {name} is not finished; run medllm pipeline again")
        return dict(found)

    while waiting:
        name = waiting.pop()
        seen[name] = seen.get(name) or record(name, "the model")
        for part, key in seen[name]["parts"].items():
            before = part.removeprefix("stage ")
            if before == part:
                continue
            if before not in seen:
                seen[before] = record(before, name)
                waiting.append(before)
            if seen[before]["key"] != key:
                raise UserError(f"chain: stage {name} was made before {before} was redone; run medllm pipeline again")
    return []
