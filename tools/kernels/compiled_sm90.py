"""Compile every Triton kernel for Hopper, on any machine, and tabulate what ptxas made of it.

Usage: python tools/kernels/compiled_sm90.py [docs/benchmarks/kernels-sm90.md]

Triton carries ptxas and cuobjdump in its wheel, so no GPU and no CUDA toolkit are needed. A spill (STACK, LDL, STL), a
missing wide load or a missing FP8 conversion is visible here; speed is not.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import megatron_medllm.kernels.fp8.quantize_triton as fp8
import megatron_medllm.kernels.logprob.rows_triton as head
import megatron_medllm.kernels.rope.rope_triton as rope
import megatron_medllm.kernels.swiglu.swiglu_triton as swiglu
from megatron_medllm.storage import atomic_write

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY_LIMIT = 227 * 1024


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, and the SASS instructions it must contain."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """What cuobjdump says of a variant; registers are per thread."""

    variant: Variant
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    found: dict[str, int]

    @property
    def problems(self) -> list[str]:
        """Empty where the kernel is as it should be."""
        wrong = [f"no {name}" for name, count in self.found.items() if count == 0]
        if self.stack_bytes or self.spill_instructions:
            wrong.append(f"spills: stack {self.stack_bytes} bytes, {self.spill_instructions} local loads and stores")
        if self.shared_bytes > SHARED_MEMORY_LIMIT:
            wrong.append(f"{self.shared_bytes} bytes of shared memory, Hopper has {SHARED_MEMORY_LIMIT}")
        return wrong


_EXP, _WIDE_LOAD, _WIDE_STORE, _TO_FP8 = "MUFU.EX2", "LDG.E.128", "STG.E.128", "SATFINITE.E4M3"
_INTEGERS = dict.fromkeys(
    (
        *("rows", "columns", "m", "k", "n", "heads", "half", "width"),
        *(
            "z_stride",
            "dy_stride",
            "out_stride",
            "x_stride",
            "q_stride",
            "qt_stride",
            "w_stride",
            "token_stride",
            "head_stride",
        ),
    ),
    "i32",
)
_POINTERS = {
    "target_ptr": "*i64",
    **dict.fromkeys(("stats_ptr", "lse_ptr", "grad_logprob_ptr", "grad_lse_ptr"), "*fp32"),
    **dict.fromkeys(("s_ptr", "st_ptr", "cosines_ptr", "sines_ptr"), "*fp32"),
    **dict.fromkeys(("q_ptr", "qt_ptr"), "*fp8e4nv"),
    **dict.fromkeys(("x_ptr", "w_ptr"), "*bf16"),
}
_UNALIGNED = {"s_stride", "heads"}  # k / 128 and the heads on a rank need not be a multiple of 16


def variants() -> Iterator[Variant]:
    """Every kernel in the forms that training at 7B and 72B launches."""
    for z in ("fp32", "bf16"):
        types, constants = {"z_ptr": f"*{z}"}, {"BLOCK": 4096}
        yield Variant(f"row_stats, {z} logits", head.row_stats_kernel, types, constants, 8, (_EXP, _WIDE_LOAD))
        yield Variant(
            f"logits_gradient to bf16, {z} logits",
            head.logits_gradient_kernel,
            {**types, "out_ptr": "*bf16"},
            constants,
            8,
            (_EXP, _WIDE_LOAD, _WIDE_STORE),
        )
    for columns in (False, True):
        both, rows, warps = (", rows and columns", 128, 8) if columns else (", rows", 32, 4)
        for power_of_two in (False, True):
            scale = ", power of two" if power_of_two else ""
            constants = {"COLUMNS": columns, "POWER_OF_TWO": power_of_two, "ROWS": rows}
            expected = (_WIDE_LOAD, _TO_FP8)
            yield Variant(
                f"quantize_activation{both}{scale}", fp8.quantize_activation_kernel, {}, constants, warps, expected
            )
    types = {"s_stride": "i32"}
    yield Variant(
        "quantize_weight", fp8.quantize_weight_kernel, types, {"POWER_OF_TWO": False}, 8, (_WIDE_LOAD, _TO_FP8)
    )
    for width in (64, 128):
        constants = {"HEADS": 4, "BLOCK": width // 2}
        yield Variant(f"rotate, heads of {width}", rope.rotate_kernel, {"out_ptr": "*bf16"}, constants, 4, ())
    types, constants = {"out_ptr": "*bf16", "dy_ptr": "*bf16"}, {"BLOCK": 1024}
    for name, kernel in (("forward", swiglu.swiglu_forward_kernel), ("backward", swiglu.swiglu_backward_kernel)):
        yield Variant(f"swiglu, {name}", kernel, types, constants, 4, (_EXP, _WIDE_LOAD, _WIDE_STORE))
    types = {"q_ptr": "*u8", "out_ptr": "*u8"}
    yield Variant("transpose_fp8", fp8.transpose_kernel, types, {"TILE": 128}, 8, (_WIDE_LOAD, _WIDE_STORE))


def compile_variant(variant: Variant) -> Compiled:
    """Compile for sm_90 and read registers, stack, shared memory and instructions from the cubin."""
    names = variant.kernel.arg_names
    known = {**_POINTERS, **_INTEGERS, **variant.types}
    signature = {name: "constexpr" if name in variant.constants else known[name] for name in names}
    aligned = [
        (position,)
        for position, name in enumerate(names)
        if name not in _UNALIGNED and (signature[name].startswith("*") or signature[name] == "i32")
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={position: [["tt.divisibility", 16]] for position in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": variant.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run_cuobjdump("--dump-resource-usage", file.name)
        sass = _run_cuobjdump("--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(
        variant=variant,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"],
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=binary.metadata.shared,
        found={name: sass.count(name) for name in variant.expected},
    )


def _run_cuobjdump(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def write_table(path: Path, results: list[Compiled]) -> None:
    """The document: one row a variant."""
    lines = [
        "# Triton kernels as compiled for sm_90",
        "",
        f"Triton {triton.__version__} and the ptxas in its wheel; no GPU involved. Registers are per thread (65,536 a "
        "multiprocessor, 255 a thread), shared memory per block (limit 227 KiB). Made by "
        "`python tools/kernels/compiled_sm90.py docs/benchmarks/kernels-sm90.md`; the tests compile the same and fail "
        "on a spill, on too much shared memory and where an expected instruction is missing.",
        "",
        "None of these kernels multiplies matrices: GEMMs are cuBLAS (`torch.mm` with fp32 output, `scaled_mm`), so "
        "no wgmma is expected. What is: 128-bit loads and stores, hardware exp (MUFU.EX2), and the saturating "
        "conversion to e4m3.",
        "",
        "| kernel | warps | registers | spills | shared memory, bytes | instructions looked for |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        found = ", ".join(f"{name} x {count}" for name, count in result.found.items())
        spills = "none" if not (result.stack_bytes or result.spill_instructions) else f"{result.stack_bytes} bytes"
        variant = result.variant
        lines.append(
            f"| {variant.name} | {variant.warps} | {result.registers} | {spills} | {result.shared_bytes:,} | {found} |"
        )
    with atomic_write(path) as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def main() -> int:
    """Compile all, print, write the table where a path is given; 1 if a kernel is not as it should be."""
    results = [compile_variant(variant) for variant in variants()]
    for result in results:
        verdict = "; ".join(result.problems) or "ok"
        print(f"{result.variant.name}: {result.registers} registers, {result.shared_bytes} bytes shared: {verdict}")
    if len(sys.argv) > 1:
        write_table(Path(sys.argv[1]), results)
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
