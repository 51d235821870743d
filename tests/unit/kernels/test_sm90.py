"""Every Triton kernel compiles for Hopper without a GPU: no spills, shared memory within 227 KiB, wide loads."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton

REPOSITORY = Path(__file__).parents[3]


def load_tool():
    spec = importlib.util.spec_from_file_location("compiled_sm90", REPOSITORY / "tools/kernels/compiled_sm90.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compiled_sm90"] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()
VARIANTS = list(tool.variants())


@pytest.mark.parametrize("variant", VARIANTS, ids=[variant.name for variant in VARIANTS])
def test_compiles_without_spills(variant):
    compiled = tool.compile_variant(variant)
    assert compiled.problems == []
    assert 16 <= compiled.registers <= 255


def test_every_kernel_has_a_variant():
    def kernels(module) -> set[str]:
        return {name for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}

    compiled = {variant.kernel.__name__ for variant in VARIANTS}
    entry_points = {
        name
        for name in kernels(tool.head) | kernels(tool.fp8) | kernels(tool.rope) | kernels(tool.swiglu)
        if name.endswith("_kernel")
    }
    assert compiled == entry_points


def test_a_spill_or_a_missing_instruction_is_a_problem():
    good = tool.Compiled(VARIANTS[0], 64, 0, 0, 1024, {"LDG.E.128": 4})
    assert good.problems == []
    assert replace(good, stack_bytes=16).problems == ["spills: stack 16 bytes, 0 local loads and stores"]
    assert replace(good, found={"LDG.E.128": 0}).problems == ["no LDG.E.128"]
    assert replace(good, shared_bytes=232449).problems == ["232449 bytes of shared memory, Hopper has 232448"]


def test_the_document_lists_every_variant():
    document = (REPOSITORY / "docs/benchmarks/kernels-sm90.md").read_text()
    for variant in VARIANTS:
        assert f"| {variant.name} |" in document
