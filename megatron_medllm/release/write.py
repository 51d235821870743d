"""`medllm release`: the folder that one uploads, whole or not there at all."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_medllm.checkpoint.hf_target import DIGESTS_NAME, partial_dir, refuse_existing
from megatron_medllm.checkpoint.safetensors_file import digest_entry, read_header
from megatron_medllm.config.hf_files import INDEX_NAME, weight_files
from megatron_medllm.errors import UserError
from megatron_medllm.inference.model_files import check_model_dir
from megatron_medllm.release import generation, licences
from megatron_medllm.release.card import CardFacts, data_rows, model_card, restricted_sources
from megatron_medllm.release.chain import THREADS, Inventory, digest_files, exam_summary
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.release.links import check_links
from megatron_medllm.release.provenance_file import NAME as PROVENANCE
from megatron_medllm.release.provenance_file import write_provenance
from megatron_medllm.storage import digest_value, full_disk_error, read_json, write_json

CARD, LICENCE, NOTICE = "README.md", "LICENSE", "NOTICE"
_WRITTEN = {CARD, LICENCE, NOTICE, PROVENANCE, generation.NAME}
_TAKEN = (".json", ".txt", ".jinja", ".model", ".tiktoken")


@dataclass(frozen=True)
class ReleaseOptions:
    """What the user says that no file of the run does; names as on the command line."""

    stage: str | None = None
    name: str | None = None
    base_model: str | None = None
    base_licence: str | None = None
    licence: str | None = None
    licence_file: Path | None = None
    languages: tuple[str, ...] = ("ja",)
    hardware: str | None = None
    source_licences: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Released:
    """What was released; `warnings` are for whoever uploads it."""

    model: str
    files: tuple[str, ...]
    licence: str
    warnings: tuple[str, ...]


def write_release(run_dir: Path, hf_dir: Path, options: ReleaseOptions) -> Released:
    """Write the release of a run's model to `hf_dir`.

    Raises:
        UserError: no exam, a licence that forbids it, a chain with a gap, a damaged weight, a full disk; `hf_dir`
            is not there then.
    """
    refuse_existing(hf_dir)
    run = FinishedRun.open(run_dir, options.stage)
    summary = exam_summary(run)
    check_model_dir(run.model_dir)
    base, licence, text = _licence(run, options)
    rows = data_rows(run, summary, options.source_licences)
    inventory = Inventory(run)
    chain = inventory.digests()
    digests = inventory.by_path(chain)
    notes = check_links(run, digests)
    check_tensors(run.model_dir)
    settings = generation.generation_config(run)
    facts = CardFacts(
        name=options.name or hf_dir.name,
        base=base,
        licence=licence,
        chain_digest=digest_value(chain),
        has_chat_template=generation.has_chat_template(run.model_dir),
        end_tokens=settings.get("eos_token_id"),
        not_compared=notes,
        languages=options.languages,
        hardware=options.hardware,
        source_licences=options.source_licences,
    )
    partial = partial_dir(hf_dir)
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    try:
        partial.mkdir(parents=True)
        _take_model(run.model_dir, partial)
        write_json(partial / generation.NAME, settings)
        (partial / CARD).write_text(model_card(run, facts), encoding="utf-8")
        if text is not None:
            (partial / LICENCE).write_bytes(text)
        if base is not None and base.licence is not None and base.licence.notice:
            (partial / NOTICE).write_text(base.licence.notice + "\n", encoding="utf-8")
        names = sorted(path.name for path in partial.iterdir())
        # A hard link is the file itself; a copy is read again.
        files = dict(zip(names, digest_files([partial / name for name in names], "release"), strict=True))
        _same_weights(run, digests, files)
        write_provenance(partial / PROVENANCE, model=run.model, chain=chain, files=files, notes=notes)
        os.replace(partial, hf_dir)
    except OSError as error:
        raise full_disk_error(error, hf_dir) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    named = licence.identifier if licence is not None else "not stated"
    return Released(run.model, (*names, PROVENANCE), named, tuple(_warnings(run, rows, notes)))


def _licence(
    run: FinishedRun, options: ReleaseOptions
) -> tuple[licences.BaseModel | None, licences.Licence | None, bytes | None]:
    directory = run.base_dir()
    base = None
    if directory is not None:
        base = licences.base_model(directory, hub_id=options.base_model, licence=options.base_licence)
    elif options.base_licence is not None or options.base_model is not None:
        raise UserError("--base-model, --base-licence: this run began with random weights")
    licence = licences.choose(base, options.licence)
    return base, licence, licences.licence_text(licence, base, options.licence_file)


def check_tensors(model_dir: Path) -> None:
    """Every tensor against the digest that its writer recorded, where it did.

    Raises:
        UserError: names the damaged tensor.
    """
    path = model_dir / DIGESTS_NAME
    expected: dict[str, str] = read_json(path)["tensors"] if path.is_file() else {}
    places = {
        name: (file, entry)
        for file in weight_files(model_dir)
        for name, entry in read_header(file).items()
        if name in expected
    }
    missing = next((name for name in expected if name not in places), None)
    if missing is not None:
        raise UserError(f"{model_dir}: tensor {missing!r} is missing, though {DIGESTS_NAME} names it")
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda place: digest_entry(*place), places.values())
            for (name, (file, _)), digest in zip(places.items(), found, strict=True):
                if digest != expected[name]:
                    raise UserError(f"{file}: tensor {name!r} does not match its digest: a damaged file")
    except EOFError:
        raise UserError(f"{model_dir}: a safetensors file is truncated") from None


def _take_model(model_dir: Path, target: Path) -> None:
    """Weights as hard links where the file system can, the small files as copies."""
    for path in weight_files(model_dir):
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target / path.name)
    for path in sorted(model_dir.iterdir()):
        if path.name.endswith(_TAKEN) and path.name not in _WRITTEN and path.is_file():
            shutil.copyfile(path, target / path.name)


def _same_weights(run: FinishedRun, digests: dict[Path, str], files: dict[str, str]) -> None:
    for path in [*weight_files(run.model_dir), run.model_dir / INDEX_NAME]:
        if path in digests and files.get(path.name) != digests[path]:
            raise UserError(f"{path}: changed while it was being released")


def _warnings(run: FinishedRun, rows: list[dict[str, object]], notes: list[str]) -> list[str]:
    found = [f"not compared: {note}" for note in notes]
    untold = dict.fromkeys(str(row["source"]) for row in rows if row["licence"] == "not stated")
    if untold:
        found.append(f"the card says that the licence of {', '.join(untold)} is not stated (--source-licence NAME=ID)")
    if limited := restricted_sources(rows):
        found.append(f"licences of sources that restrict use: {', '.join(limited)}")
    if run.config.demo is not None:
        found.append("the card says that all content is invented")
    return found
