"""Published throughputs, as workloads: what the efficiencies of the H100 files are calibrated on and tested against.

Sources: Megatron-Bridge "Performance Summary" (DGX H100), torchtitan `benchmarks/` and arXiv 2410.06511 (H100 limited
to 500 W, 2.4 TB/s memory), MaxText's table (H200). Where a source leaves a number open, `note` says what is assumed.
"""

from dataclasses import dataclass

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES, ModelShape
from megatron_medllm.planner.plan import plan
from megatron_medllm.planner.workload import Mode, Workload


@dataclass(frozen=True)
class Published:
    """One row: tokens/s/GPU as published; `calibrates` names the constant that this row sets."""

    name: str
    hardware: str
    workload: Workload
    tokens_per_s_per_gpu: float
    calibrates: str = ""
    note: str = ""

    def predicted(self) -> float:
        """Tokens/s/GPU by the planner."""
        return plan(self.workload, self.hardware).tokens_per_s_per_gpu

    def error(self) -> float:
        """Predicted / published - 1."""
        return self.predicted() / self.tokens_per_s_per_gpu - 1


def _shape(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        tie_embeddings=False,
    )


LLAMA3_8B = _shape(32, 4096, 32, 8, 14336, 128256)
LLAMA3_70B = _shape(80, 8192, 64, 8, 28672, 128256)
LLAMA2_70B = _shape(80, 8192, 64, 8, 28672, 32000)
LLAMA31_405B = _shape(128, 16384, 128, 8, 53248, 128256)
GPT3_175B = _shape(96, 12288, 96, 96, 32768, 51200)


def _layout(nodes: int, **sizes: object) -> LayoutConfig:
    return LayoutConfig.model_validate({"nodes": nodes, "gpus_per_node": 8, **sizes})


def _fp8(shape: ModelShape, layout: LayoutConfig, *, length: int, batch: int, micro: int = 1) -> Workload:
    return Workload(
        shape=shape,
        layout=layout,
        precision="fp8",
        backend="te",
        sequence_length=length,
        global_batch_size=batch,
        micro_batch_size=micro,
    )


def _titan(shape: ModelShape, layout: LayoutConfig, *, precision: str, batch: int, micro: int) -> Workload:
    return Workload(
        shape=shape,
        layout=layout,
        precision="fp8" if precision == "fp8" else "bf16",
        backend="te",
        sequence_length=8192,
        global_batch_size=batch,
        micro_batch_size=micro,
    )


_TITAN_70B = _layout(32, tp=8, sp=True, recompute="full")
_TITAN_8B = _layout(1, recompute="full")
_LORA_70B = Workload(
    shape=LLAMA3_70B,
    layout=_layout(1, tp=2, pp=4, vpp=20, sp=True),
    mode="lora",
    precision="fp8",
    backend="te",
    sequence_length=4096,
    global_batch_size=32,
)
_MAXTEXT_70B = Workload(
    shape=LLAMA3_70B,
    layout=_layout(8, recompute="full"),
    backend="te",
    sequence_length=8192,
    global_batch_size=128,
    micro_batch_size=2,
)


def _one_gpu(size: str, mode: Mode, length: int, *, rows: int = 1, attended: int | None = None) -> Workload:
    return Workload(
        shape=SIZES[size],  # type: ignore[index]  # a name of the table
        layout=LayoutConfig(),
        mode=mode,
        sequence_length=length,
        global_batch_size=rows,
        attended_length=attended,
    )


_FULL_7B = Workload(
    shape=SIZES["7b"],
    layout=LayoutConfig(recompute="full"),
    sequence_length=4096,
    global_batch_size=1,
    moments_bytes=4,
)

ROWS = (
    Published(
        "Llama 3 70B FP8 pretraining",
        "h100-sxm",
        _fp8(LLAMA3_70B, _layout(8, tp=4, pp=8, vpp=5, sp=True), length=8192, batch=256),
        1664,
        calibrates="efficiency_gemm_fp8",
    ),
    Published(
        "Llama 3 70B FP8 SFT",
        "h100-sxm",
        _fp8(LLAMA3_70B, _layout(4, tp=4, pp=4, vpp=5, sp=True), length=4096, batch=32),
        1638,
        note="batch 32 assumed",
    ),
    Published("Llama 3 70B FP8 LoRA", "h100-sxm", _LORA_70B, 2643, note="batch 32, rank 16 assumed"),
    Published(
        "Llama 3.1 405B FP8 pretraining",
        "h100-sxm",
        _fp8(LLAMA31_405B, _layout(128, tp=8, pp=8, cp=2, vpp=8, sp=True), length=8192, batch=1536),
        311,
        note="126 layers, embedding and head over 64 chunks: planned as 128 layers; batch 1,536 assumed",
    ),
    Published(
        "Llama 2 70B FP8 pretraining",
        "h100-sxm",
        _fp8(LLAMA2_70B, _layout(8, tp=4, pp=4, vpp=20, sp=True), length=4096, batch=128),
        1728,
        note="batch 128 assumed",
    ),
    Published(
        "GPT-3 175B FP8 pretraining",
        "h100-sxm",
        _fp8(GPT3_175B, _layout(64, tp=4, pp=8, vpp=6, sp=True), length=2048, batch=2048, micro=2),
        825,
        note="FFN of two 49,152-wide matrices planned as three of 32,768; batch 2,048 by 2 assumed",
    ),
    Published(
        "Llama 3 70B bf16, torchtitan",
        "h100-500w",
        _titan(LLAMA3_70B, _TITAN_70B, precision="bf16", batch=512, micro=16),
        652,
        calibrates="both GEMM efficiencies at 500 W, as one factor",
        note="FSDP planned as the distributed optimizer",
    ),
    Published(
        "Llama 3 70B FP8, torchtitan",
        "h100-500w",
        _titan(LLAMA3_70B, _TITAN_70B, precision="fp8", batch=512, micro=16),
        942,
        note="FSDP planned as the distributed optimizer",
    ),
    Published(
        "Llama 3.1 8B bf16, torchtitan",
        "h100-500w",
        _titan(LLAMA3_8B, _TITAN_8B, precision="bf16", batch=16, micro=2),
        6667,
        note="per-operation recomputation planned as full",
    ),
    Published(
        "Llama 3.1 8B FP8, torchtitan",
        "h100-500w",
        _titan(LLAMA3_8B, _TITAN_8B, precision="fp8", batch=16, micro=2),
        8532,
        note="per-operation recomputation planned as full",
    ),
    Published(
        "Llama 3.1 70B bf16, MaxText",
        "h200",
        _MAXTEXT_70B,
        1056,
        calibrates="efficiency_gemm_bf16 of H200",
        note="layout not published: FSDP over 64 GPUs, full recomputation assumed",
    ),
    # One GPU, ours: docs/benchmarks/h200.md, 2026-11-27. Where attention's plans were built in the measured steps, the
    # profiled step without that. Attended lengths are the documents' own, from the FLOPs that were counted.
    Published("ours: 7B bf16 LoRA, rows of 8,192, whole", "h200", _one_gpu("7b", "lora", 8192), 15535),
    Published(
        "ours: 7B bf16 LoRA, 4 rows of 4,096", "h200", _one_gpu("7b", "lora", 4096, rows=4, attended=1611), 17021
    ),
    Published(
        "ours: 7B LoRA on an FP8 base, 2 rows of 8,192",
        "h200",
        _one_gpu("7b", "fp8-lora", 8192, rows=2, attended=1911),
        21500,
    ),
    Published("ours: 7B RPO bf16 LoRA, 8 pairs", "h200", _one_gpu("7b", "lora", 7200, attended=716), 17595),
    Published(
        "ours: 7B, all parameters, bf16 moments", "h200", _FULL_7B, 5535, calibrates="_ROUNDING_BYTES", note="740 ms"
    ),
    Published("ours: 72B LoRA on an FP8 base", "h200", _one_gpu("72b", "fp8-lora", 2048), 2680, note="764 ms"),
)
