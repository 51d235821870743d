"""The contract of cuDNN's ragged attention, on a CPU: a front end that keeps what a graph is told and computes from it.

It reads and writes memory at the pointers, offsets, dimensions and strides that it was given, and nothing else, so that
a wrong one of them gives wrong numbers. Empty sequences give NaN, as cuDNN below 9.25 does.
"""

import ctypes
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KINDS = SimpleNamespace(BFLOAT16=torch.bfloat16, HALF=torch.float16, FLOAT=torch.float32, INT32=torch.int32,
                        INT64=torch.int64)  # fmt: skip


class NotSupportedError(Exception):
    """`cudnn.cudnnGraphNotSupportedError`: no RuntimeError."""


class Node:
    """A tensor of a graph."""

    def __init__(self, **known: Any) -> None:
        self.__dict__.update({"uid": None, "dim": None, "stride": None, "data_type": None, "ragged": None} | known)

    def set_uid(self, uid: int) -> "Node":
        self.uid = uid
        return self

    def set_output(self, output: bool) -> "Node":
        assert output
        return self

    def set_dim(self, dim: tuple[int, ...]) -> "Node":
        self.dim = dim
        return self

    def set_stride(self, stride: tuple[int, ...]) -> "Node":
        self.stride = stride
        return self

    def set_data_type(self, data_type: torch.dtype) -> "Node":
        self.data_type = data_type
        return self

    def set_ragged_offset(self, offsets: "Node") -> None:
        self.ragged = offsets


class Graph:
    """`cudnn.pygraph`, for one `sdpa` or one `sdpa_backward`."""

    unsupported = False

    def __init__(
        self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, sm_version: int, handle: Any
    ) -> None:
        assert intermediate_data_type is compute_data_type is torch.float32 and sm_version == 90 and handle == "handle"
        self.io, self.built = io_data_type, []

    def tensor(self, *, name: str, uid: int, dim: tuple, stride: tuple, data_type: torch.dtype) -> Node:
        return Node(name=name, uid=uid, dim=dim, stride=stride, data_type=data_type)

    def sdpa(self, *, name: str, generate_stats: bool, **arguments: Any) -> tuple[Node, Node]:
        assert generate_stats
        self.asked, self.outputs = arguments, {"o": Node(data_type=self.io), "stats": Node()}
        return self.outputs["o"], self.outputs["stats"]

    def sdpa_backward(
        self, *, name: str, max_total_seq_len_q: int, max_total_seq_len_kv: int, **arguments: Any
    ) -> list:
        assert max_total_seq_len_q % 64 == max_total_seq_len_kv % 64 == 0
        self.totals = max_total_seq_len_q, max_total_seq_len_kv
        self.asked, self.outputs = arguments, {name: Node(data_type=self.io) for name in ("dQ", "dK", "dV")}
        return list(self.outputs.values())

    def validate(self) -> None:
        self.built.append("validate")

    def build_operation_graph(self) -> None:
        self.built.append("build_operation_graph")

    def create_execution_plans(self, modes: list) -> None:
        self.built.append("create_execution_plans")

    def check_support(self) -> None:
        if self.unsupported:
            raise NotSupportedError("No valid engine configs")
        self.built.append("check_support")

    def build_plans(self) -> None:
        assert self.built == ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        self.built.append("build_plans")

    def get_workspace_size(self) -> int:
        return 1000

    def execute(self, pointers: dict[int, int], workspace: int, handle: Any = None) -> None:
        assert "build_plans" in self.built and workspace and handle == "handle"
        assert all(pointer % 16 == 0 for pointer in pointers.values())
        ask = self.asked
        assert ask["use_padding_mask"] and ask["diagonal_band_right_bound"] == 0
        lengths = [flat(ask[name], pointers).tolist() for name in ("seq_len_q", "seq_len_kv")]
        assert max(lengths[0]) <= ask["q"].dim[2] and max(lengths[1]) <= ask["k"].dim[2]
        if "dO" in ask:
            assert sum(lengths[0]) <= self.totals[0] and sum(lengths[1]) <= self.totals[1]
        nodes = {name: node for name, node in (ask | self.outputs).items() if isinstance(node, Node)}
        for index, (queries, keys) in enumerate(zip(*lengths, strict=True)):
            rows = {"q": queries, "o": queries, "dO": queries, "dQ": queries, "stats": queries}
            parts = {
                name: rows_of(node, pointers, index, rows.get(name, keys))
                for name, node in nodes.items()
                if not name.startswith("seq_len")
            }
            attend(parts, ask["attn_scale"], keys - queries if ask["diagonal_alignment"] == "BOTTOM_RIGHT" else 0)


def flat(node: Node, pointers: dict[int, int]) -> Tensor:
    assert node.dim[1:] == (1, 1, 1)
    return memory(pointers[node.uid], node.dim[0], node.data_type)


def memory(pointer: int, count: int, dtype: torch.dtype) -> Tensor:
    size = count * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=dtype)


def rows_of(node: Node, pointers: dict[int, int], index: int, rows: int) -> Tensor:
    """[n, rows, hn]: a sequence's part of a ragged tensor, a view of its memory."""
    start = int(flat(node.ragged, pointers)[index])
    shape, strides = (node.dim[1], rows, node.dim[3]), node.stride[1:]
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return memory(pointers[node.uid], last + 1, node.data_type).as_strided(shape, strides, start)


def attend(parts: dict[str, Tensor], scale: float, offset: int) -> None:
    """One sequence, forward or backward, in fp32; outputs are written into their views."""
    q, k, v = (parts[name].float() for name in ("q", "k", "v"))
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(offset)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
    if "dO" not in parts:
        parts["stats"].copy_(scores.logsumexp(-1, keepdim=True))
        parts["o"].copy_(scores.softmax(-1) @ v)
        return
    d_out = parts["dO"].float()
    chances = torch.exp(scores - parts["stats"])
    d_scores = chances * (d_out @ v.transpose(1, 2) - (d_out * parts["o"].float()).sum(-1, keepdim=True)) * scale
    parts["dQ"].copy_(d_scores @ k)
    for name, full in (("dK", d_scores.transpose(1, 2) @ q), ("dV", chances.transpose(1, 2) @ d_out)):
        parts[name].copy_(full.unflatten(0, (-1, group)).sum(1))


def front_end() -> Any:
    """A stand-in for the module `cudnn`."""
    return SimpleNamespace(
        data_type=KINDS,
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        diagonal_alignment=SimpleNamespace(TOP_LEFT="TOP_LEFT", BOTTOM_RIGHT="BOTTOM_RIGHT"),
        pygraph=Graph,
        cudnnGraphNotSupportedError=NotSupportedError,
        create_handle=lambda: "handle",
        set_stream=lambda *, handle, stream: None,
        backend_version=lambda: 91900,
    )
