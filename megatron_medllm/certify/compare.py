"""Differences between what a layout, one process and transformers computed, each with its bound.

A difference of tensors is relative: the norm of the difference by the norm of what is expected, to which a thousandth
of the typical tensor's is added, so that a gradient that is all but zero is not judged by its rounding.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_medllm.certify.certificate import Check
from megatron_medllm.certify.shrink import SAVED_AFTER, STEPS
from megatron_medllm.certify.whole import LAST_STAGE, Recorded, Slices, copies, whole_tensors
from megatron_medllm.config.model import ModelShape

_FLOOR = 1e-3


@dataclass(frozen=True)
class Bounds:
    """What is allowed. In fp32 the order of sums is all that differs, a few 1e-6 (docs/certify.md)."""

    numbers: float  # losses and reference log-probs
    norms: float
    gradients: float  # of the first step
    later_gradients: float
    weights: float
    truth_numbers: float
    truth_tensors: float | None  # None: not comparable
    export: float = 1e-6  # of a merged adapter; without one an export is bitwise the weights


EXACT = Bounds(1e-5, 1e-5, 2e-5, 1e-4, 1e-5, truth_numbers=1e-5, truth_tensors=2e-5)
# A sum in another order moves an activation to the next FP8 value now and then, one in sixteen away.
FP8 = Bounds(2e-2, 2e-1, 2e-1, 6e-1, 2e-1, truth_numbers=5e-2, truth_tensors=None, export=5e-2)
NF4 = Bounds(1e-5, 1e-5, 2e-5, 1e-4, 1e-5, truth_numbers=1e-1, truth_tensors=None, export=2e-1)


@dataclass(frozen=True)
class Recordings:
    """What the processes left, by rank."""

    one: list[Recorded]
    layout: list[Recorded]
    resumed: list[Recorded]
    truth: Recorded
    export: Path  # of the layout, at the end of its run
    save_export: Path | None  # of the checkpoint that the layout wrote; None on a quantized base
    base: Path  # the model that all began from
    lora_scale: float | None  # alpha / rank of the adapter, if there is one


def check_recordings(found: Recordings, shape: ModelShape, bounds: Bounds) -> list[Check]:
    """All checks of a certificate, in the order of its table."""
    one, layout = found.one[0]["steps"], found.layout[0]["steps"]
    last = SAVED_AFTER - 1
    checks = [
        _numbers("losses", [s["metrics"]["loss"] for s in layout], [s["metrics"]["loss"] for s in one], bounds.numbers),
        _numbers(
            "gradient norms",
            [s["metrics"]["grad_norm"] for s in layout],
            [s["metrics"]["grad_norm"] for s in one],
            bounds.norms,
        ),
        _tensors("gradients, step 1", found.layout, found.one, _gradients(0), shape, bounds.gradients),
        _tensors(
            f"gradients, step {last + 1}", found.layout, found.one, _gradients(last), shape, bounds.later_gradients
        ),
        _tensors(
            f"weights after step {last + 1}", found.layout, found.one, _weights(SAVED_AFTER), shape, bounds.weights
        ),
        _copies(found.layout, _weights(STEPS), shape),
        _numbers(
            "save loaded into one process: loss",
            [found.resumed[0]["steps"][0]["metrics"]["loss"]],
            [one[SAVED_AFTER]["metrics"]["loss"]],
            bounds.numbers,
        ),
        _tensors(
            "save loaded into one process: weights",
            found.resumed,
            found.one,
            _weights(STEPS),
            shape,
            bounds.weights,
        ),
        _export("export", found.export, found, STEPS, shape, bounds.export),
    ]
    if found.save_export is not None:
        checks.append(_export("export of the save", found.save_export, found, SAVED_AFTER, shape, 1e-6))
    if found.one[0].get("reference"):
        checks.append(_references("reference log-probs", found.layout[0], found.one[0]["reference"], bounds.numbers))
    return checks + _against_truth(found, shape, bounds)


def _against_truth(found: Recordings, shape: ModelShape, bounds: Bounds) -> list[Check]:
    one, truth = found.one[0]["steps"], found.truth
    steps = SAVED_AFTER if bounds.truth_tensors is not None else 1
    losses = [step["metrics"]["loss"] for step in one[:steps]]
    checks = [_numbers("transformers: losses", losses, truth["losses"][:steps], bounds.truth_numbers)]
    if bounds.truth_tensors is None:
        return checks
    norms = [step["metrics"]["grad_norm"] for step in one[:SAVED_AFTER]]
    checks.append(_numbers("transformers: gradient norms", norms, truth["grad_norms"], bounds.truth_numbers))
    for name, key, slices in (
        ("gradients, step 1", "gradients", _gradients(0)),
        (f"weights after step {SAVED_AFTER}", "weights", _weights(SAVED_AFTER)),
    ):
        ours = whole_tensors(found.one, slices, shape)
        checks.append(worst_tensor(f"transformers: {name}", ours, truth[key], bounds.truth_tensors))
    if found.one[0].get("reference"):
        checks.append(
            _references("transformers: reference log-probs", found.one[0], truth["reference"], bounds.truth_numbers)
        )
    return checks


def _gradients(step: int) -> Slices:
    return lambda rank: rank["steps"][step]["gradients"]


def _weights(step: int) -> Slices:
    """After `step` steps."""
    return lambda rank: rank["weights"][step]


def _numbers(name: str, found: list[float], expected: list[float], bound: float) -> Check:
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True)]
    differences = [d if math.isfinite(d) else math.inf for d in differences]
    worst = max(range(len(differences)), key=differences.__getitem__)
    return Check(name, differences[worst], bound, f"step {worst + 1}" if len(differences) > 1 else "")


def _tensors(
    name: str, found: list[Recorded], expected: list[Recorded], slices: Slices, shape: ModelShape, bound: float
) -> Check:
    return worst_tensor(
        name,
        whole_tensors(found, slices, shape),
        whole_tensors(expected, slices, shape),
        bound,
    )


def worst_tensor(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> Check:
    """The largest difference of tensors of one name; one that is missing or of another shape differs infinitely."""
    squares = sum(t.double().square().sum().item() for t in expected.values())
    numbers = sum(t.numel() for t in expected.values())
    worst = (0.0, "")
    for key in sorted(found.keys() | expected.keys()):
        other = expected.get(key.removesuffix(LAST_STAGE))
        mine = found.get(key)
        if mine is None or other is None or mine.shape != other.shape:
            return Check(name, math.inf, bound, key)
        floor = _FLOOR * math.sqrt(squares * other.numel() / numbers)
        difference = ((mine.double() - other.double()).norm() / (other.double().norm() + floor)).item()
        worst = max(worst, (difference if math.isfinite(difference) else math.inf, key))
    return Check(name, worst[0], bound, worst[1])


def _copies(ranks: list[Recorded], slices: Slices, shape: ModelShape) -> Check:
    worst = (0.0, "")
    for name, one, other in copies(ranks, slices, shape):
        difference = ((one - other).norm() / one.norm().clamp(min=1e-12)).item()
        worst = max(worst, (difference if math.isfinite(difference) else math.inf, name))
    return Check("copies of a weight on several ranks", worst[0], 1e-6, worst[1])


def _export(name: str, directory: Path, found: Recordings, step: int, shape: ModelShape, bound: float) -> Check:
    """An HF directory against the weights that the layout had behind a step: bitwise, or merged into the base."""
    weights = whole_tensors(found.layout, _weights(step), shape)
    if found.lora_scale is None:
        own = {key: tensor for key, tensor in weights.items() if not key.endswith(LAST_STAGE)}
        return worst_tensor(name, _read(directory), own, 0.0)
    merged = _read(found.base)
    for key, half in weights.items():
        if key.endswith(".lora_b"):
            layer, hf = key.removesuffix(".lora_b").split("|")
            merged[hf] = merged[hf] + found.lora_scale * half @ weights[f"{layer}.lora_a"]
    return worst_tensor(name, _read(directory), merged, bound)


def _read(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _references(name: str, found: Recorded, expected: dict[int, tuple[float, float]], bound: float) -> Check:
    mine = found["reference"]
    if mine.keys() != expected.keys():
        return Check(name, math.inf, bound, "rows")
    rows = sorted(expected)
    ours, theirs = (torch.tensor([table[row] for row in rows], dtype=torch.float64) for table in (mine, expected))
    differences = ((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).amax(1)
    worst = int(differences.argmax())
    return Check(name, float(differences[worst]), bound, f"row {rows[worst]}")
