"""What a GPU and its cluster can do: read from the JSON files beside this module, or from a user's own."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_medllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and the links around it.

    Memory in bytes, peaks in dense FLOP/s, bandwidths in bytes/s per GPU and direction, latencies in seconds.
    `efficiency_*` is what a kernel reaches of its peak: `..._fp8` with TE's per-tensor scales, `..._fp8_blocks` with
    our 128-wide blocks. `host_step_s`: what the device waits for the host in a step. `sources` says where every number
    is from.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    peak_bf16_flops: float
    peak_fp8_flops: float | None
    memory_bandwidth: float
    gpus_per_node: int
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    collective_latency_s: float
    storage_bandwidth_per_node: float
    storage_bandwidth_total: float
    efficiency_gemm_bf16: float
    efficiency_gemm_fp8: float
    efficiency_gemm_fp8_blocks: float
    efficiency_attention: float
    efficiency_memory: float
    efficiency_link: float
    overlap_tensor_parallel: float
    overlap_data_parallel: float
    host_step_s: float
    mtbf_gpu_hours: float
    sources: dict[str, str]


def known_hardware() -> list[str]:
    """Names of the descriptions that come with the package."""
    folder = resources.files("megatron_medllm.planner") / "machines"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_hardware(name: str) -> Hardware:
    """Load a description by its name, or from a path ending in .json.

    Raises:
        UserError: no such description, or a field is missing, unknown or of the wrong kind.
    """
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{path}: no such hardware description")
        text = path.read_text(encoding="utf-8")
    elif name in known_hardware():
        text = (resources.files("megatron_medllm.planner") / "machines" / f"{name}.json").read_text(encoding="utf-8")
    else:
        raise UserError(f"unknown hardware {name!r}; known: {', '.join(known_hardware())}, or the path of a .json file")
    return _parse(text, where=name)


def _parse(text: str, *, where: str) -> Hardware:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    fields = {field.name for field in dataclasses.fields(Hardware)}
    for problem, names in (("missing", fields - set(values)), ("unknown", set(values) - fields)):
        if names:
            raise UserError(f"{where}: {problem} field {sorted(names)[0]!r}")
    for field, value in values.items():
        if field not in ("name", "sources", "peak_fp8_flops") and not (isinstance(value, int | float) and value >= 0):
            raise UserError(f"{where}: {field} must be a number >= 0, found {value!r}")
    return Hardware(**values)
