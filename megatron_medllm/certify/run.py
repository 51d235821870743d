"""`medllm certify`: prove a run's layout on this machine's CPUs, before anyone asks for a GPU."""

import importlib.util
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.certify.certificate import (
    Certificate,
    Check,
    read_certificate,
    settings_of,
    utc_now,
    versions,
    write_certificate,
)
from megatron_medllm.certify.compare import EXACT, FP8, NF4, Bounds, Recordings, check_recordings
from megatron_medllm.certify.shrink import SAVED_AFTER, Shrunken, in_one_process, shrink
from megatron_medllm.certify.whole import Recorded
from megatron_medllm.certify.world import write_inputs
from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, write_json

log = logging.getLogger(__name__)

HOST = "megatron_medllm.certify.host"
MAX_RANKS = 8
_TIMEOUT_S = 300.0  # of one phase
_PROCESSES = ("one", "layout", "resumed", "truth", "save")


def certify(
    run: RunConfig, *, max_ranks: int = MAX_RANKS, again: bool = False, host: str = HOST
) -> tuple[Certificate, bool]:
    """The certificate of `run.stage`: the one in the run directory if it still holds, else a new one, written there.

    Args:
        run: the user's run; its model and data are not read, but for the model's shape.
        max_ranks: most processes to run; a larger layout is folded.
        again: prove it anew in any case.
        host: module that runs the processes; tests name one that breaks something first.

    Returns:
        the certificate, passed or not, and whether it was there before.

    Raises:
        UserError: the layout cannot be folded, or does not fit the model.
    """
    if not again:
        try:
            found = read_certificate(run)
        except UserError as error:
            log.warning("%s: making a new one", error)
            found = None
        if found is not None:
            return found, True
    run.layout.check_model(run.model.resolve_shape())
    certificate = prove(run, max_ranks=max_ranks, host=host)
    write_certificate(certificate, run.run_dir)
    return certificate, False


def prove(run: RunConfig, *, max_ranks: int, host: str = HOST) -> Certificate:
    """Run the shrunken layout, one process and transformers, and compare. Arguments as for `certify`."""
    started = time.monotonic()
    has_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    with tempfile.TemporaryDirectory(prefix="medllm-certify-") as directory:
        place = Path(directory)
        shrunken = shrink(run, place, max_ranks=max_ranks, has_nf4=has_nf4)
        write_inputs(shrunken.run, shrunken.shape, place)
        _run_host(host, _jobs(shrunken, place), place)
        checks = _failures(place) or check_recordings(_load(place, shrunken), shrunken.shape, _bounds(shrunken.run))
    return Certificate(
        stage=run.stage,
        settings=settings_of(run),
        versions=versions(),
        folding=shrunken.notes,
        layout=shrunken.run.layout.model_dump(mode="json"),
        ranks=shrunken.run.layout.world_size,
        checks=tuple(checks),
        seconds=round(time.monotonic() - started, 1),
        made=utc_now(),
    )


def _jobs(shrunken: Shrunken, place: Path) -> dict[str, Any]:
    run, one = shrunken.run, in_one_process(shrunken.run, place / "one")
    save = run.output_dir() / f"checkpoints/step-{SAVED_AFTER:08d}"

    def task(name: str, do: str, needs: list[str], ranks: int = 1, **more: Any) -> dict[str, Any]:
        return {"name": name, "do": do, "needs": needs, "ranks": ranks, "out": str(place / "found" / name), **more}

    def settings(of: RunConfig) -> dict[str, Any]:
        return of.model_dump(mode="json")

    resumed = in_one_process(shrunken.run, place / "resumed")
    adapter = run.stage_config().adapter
    first = [
        task("one", "train", [], settings=settings(one)),
        task("layout", "train", [], run.layout.world_size, settings=settings(run)),
    ]
    second = [
        task("resumed", "train", ["layout"], settings=settings(resumed), resume_from=str(save)),
        task("truth", "truth", ["one"], settings=settings(one), start=str(place / "found/one/rank-0.pt")),
    ]
    if adapter is None or adapter.base == "bf16":  # on a quantized base only the run itself merges
        base = str(place / "model") if adapter is not None else None
        second.append(task("save", "export", ["layout"], checkpoint=str(save), base=base))
    return {"timeout_s": _TIMEOUT_S, "phases": [first, second]}


def _run_host(host: str, jobs: dict[str, Any], place: Path) -> None:
    """Run the processes in a fresh one: who forks must not have used autograd, and CUDA must not be seen."""
    write_json(place / "jobs.json", jobs)
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", host, str(place / "jobs.json")],
        env=inherited | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{host} ended with status {done.returncode}:\n{done.stdout[-4000:]}")


def _failures(place: Path) -> list[Check]:
    """Processes that ended with an error: checks that failed without a number."""
    found = []
    for name in _PROCESSES:
        path = place / "found" / name / "failed.json"
        if path.is_file():
            found.append(Check(f"{name}: runs to its end", math.inf, 0.0, read_json(path)["reason"][:300]))
    return found


def _load(place: Path, shrunken: Shrunken) -> Recordings:
    def ranks(name: str, count: int) -> list[Recorded]:
        return [torch.load(place / "found" / name / f"rank-{rank}.pt") for rank in range(count)]

    save_export = place / "found/save/hf"
    layout, adapter = shrunken.run.output_dir(), shrunken.run.stage_config().adapter
    return Recordings(
        one=ranks("one", 1),
        layout=ranks("layout", shrunken.run.layout.world_size),
        resumed=ranks("resumed", 1),
        truth=torch.load(place / "found/truth/truth.pt"),
        export=layout / "hf",
        save_export=save_export if save_export.is_dir() else None,
        base=place / "model",
        lora_scale=None if adapter is None else adapter.alpha / adapter.rank,
    )


def _bounds(run: RunConfig) -> Bounds:
    section = run.stage_config()
    if section.fp8 != "none" or (section.adapter is not None and section.adapter.base == "fp8"):
        return FP8
    return NF4 if section.adapter is not None and section.adapter.base == "nf4" else EXACT
