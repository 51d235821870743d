"""Mends the float casts of Triton's interpreter, which round wrongly from fp32 to bf16 and FP8 (3.6 to 3.9).

The GPU rounds to nearest even, and saturates into FP8; the interpreter does not, silently. `repair_casts` sends casts
between floats through torch, whose own are right (and are checked byte for byte in `interpreted_cases`).
"""

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

_TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_UNSIGNED = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16), 4: (np.uint32, torch.uint32)}
_UNSIGNED[8] = (np.uint64, torch.uint64)
_original = interpreter._convert_float


def cast_like_gpu(values: Tensor, dtype: torch.dtype) -> Tensor:
    """cvt.rn, with satfinite into FP8."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        values = torch.where(values.isnan(), values.float(), values.float().clamp(-limit, limit))
    return values.to(dtype)


def repair_casts() -> None:
    """Replace the interpreter's cast in this process."""
    interpreter._convert_float = _convert


def _convert(data: np.ndarray, source, destination, rounding_mode) -> np.ndarray:
    names = (source.name, destination.name)
    to_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
    if to_zero or any(name not in _TORCH_TYPES for name in names):
        return _original(data, source, destination, rounding_mode)
    from_type, to_type = (_TORCH_TYPES[name] for name in names)
    flat = np.ascontiguousarray(data).view(_UNSIGNED[from_type.itemsize][0]).reshape(-1)
    cast = cast_like_gpu(torch.from_numpy(flat.copy()).view(from_type), to_type)
    return cast.view(_UNSIGNED[to_type.itemsize][1]).numpy().reshape(data.shape)
