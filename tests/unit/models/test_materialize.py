"""A quantized base built layer by layer: the same model, bit for bit, in less of the host's memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.runtime import Runtime
from tests.worlds.model_dir import write_twin
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(hidden_size=128, ffn_hidden_size=320, vocab_size=96)


def recipe(shape: ModelShape | None, *, base: str, layout: LayoutConfig, path: Path | None = None) -> RunConfig:
    model: dict[str, Any] = {"dtype": "bfloat16"} | ({"path": path} if path else {"shape": shape})
    cpt = {
        "optimizer": {"lr": 0.01},
        "sequence_length": 32,
        "global_batch_size": 4,
        "data": [{"path": "unread"}],
        "train_tokens": 128,
        "adapter": {"rank": 4, "base": base},
    }
    return RunConfig.model_validate({"run_dir": "unwritten", "model": model, "layout": layout.model_dump(), "cpt": cpt})


def at_once(run: RunConfig, ranks: Runtime) -> list[Any]:
    """The whole model in bf16, then quantized."""
    from megatron_medllm.checkpoint.hf_reader import load_hf_weights
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    adapter, tp = run.stage_config().adapter, {"tp_rank": ranks.tp_rank, "tp_size": run.layout.tp}
    assert adapter is not None
    chunks = build_model(run.model, run.layout, device=ranks.device, fp8_weights=adapter.base == "fp8")
    if run.model.path is None:
        initialize_weights(chunks, seed=run.seed, **tp)
    else:
        load_hf_weights(chunks, run.model.path, run.model.resolve_shape(), **tp)
    add_adapters(map(unwrap, chunks), adapter, seed=run.seed, **tp)
    return chunks


def contents(chunks: list[Any]) -> dict[str, Any]:
    """Every tensor by name, with its marks; of quantized weights what they multiply by."""
    from megatron_medllm.models.adapters import AdaptedLinear

    found: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            marks = {key: value for key, value in vars(parameter).items() if not key.startswith("_")}
            found[f"{index}.{name}"] = (parameter.detach(), parameter.requires_grad, marks)
        for name, module in chunk.named_modules():
            if isinstance(module, AdaptedLinear):
                assert module.frozen is not None
                found[f"{index}.{name}.frozen"] = (module.frozen.dense(), False, {})
            tensors = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
            found |= {f"{index}.{name}.{key}": (tensor, False, {}) for key, tensor in tensors.items()}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, (tensor, trains, marks) in expected.items():
        assert not found[name][0].is_meta, name
        assert torch.equal(found[name][0], tensor), name
        assert found[name][1:] == (trains, marks), name


@pytest.mark.parametrize("base", ["fp8", "nf4"])
@pytest.mark.parametrize(
    ("layout", "rank", "tied"),
    [
        ({}, 0, True),
        ({"tp": 2, "sp": True, "pp": 2}, 1, True),
        ({"tp": 2, "pp": 2}, 2, True),
        ({"pp": 2, "vpp": 2}, 1, False),
    ],
)
def test_every_rank_is_the_same_as_built_at_once(layout: dict[str, Any], rank: int, tied: bool, base: str):
    from megatron_medllm.train.model import build_chunks, resolve_adapter

    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    shape = tiny_shape(hidden_size=128, ffn_hidden_size=320, vocab_size=96, tie_embeddings=tied)
    run = recipe(shape, base=base, layout=LayoutConfig(**layout))
    ranks = runtime.start(run.layout, seed=0, alone_as=rank)
    try:
        expected = contents(at_once(run, ranks))
        adapter = resolve_adapter(run.stage_config().adapter, shape)
        found = contents(build_chunks(run, ranks, adapter=adapter, fp8=None))
    finally:
        runtime.stop()
    assert_same(found, expected)


def test_weights_of_a_directory_are_the_same_as_built_at_once(tmp_path: Path):
    from megatron_medllm.train.model import build_chunks

    path = write_twin(tmp_path / "model", SHAPE)
    run = recipe(None, base="fp8", layout=LayoutConfig(tp=2, pp=2), path=path)
    ranks = runtime.start(run.layout, seed=0, alone_as=3)
    try:
        expected = contents(at_once(run, ranks))
        found = contents(build_chunks(run, ranks, adapter=run.stage_config().adapter, fp8=None))
    finally:
        runtime.stop()
    assert_same(found, expected)


def test_the_host_never_holds_the_model_in_bf16():
    """112 M weights: 224 MB in bf16, 112 MB in FP8, 9 MB in a layer."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.models.test_materialize"]
    root = Path(__file__).parents[3]
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    bf16_bytes, peak = map(int, output.split()[-2:])
    assert peak < 0.9 * bf16_bytes, f"{peak / 1e6:.0f} MB for a model of {bf16_bytes / 1e6:.0f} MB in bf16"


def _print_peak() -> None:
    """Bytes of the model in bf16, and by how much the process grew at most while it was built in FP8."""
    import resource

    from megatron_medllm.train.model import build_chunks

    shape = tiny_shape(num_layers=24, hidden_size=512, ffn_hidden_size=2560, vocab_size=256)
    run = recipe(shape, base="fp8", layout=LayoutConfig())
    ranks = runtime.start(run.layout, seed=0)
    small = recipe(SHAPE, base="fp8", layout=LayoutConfig())
    build_chunks(small, ranks, adapter=small.stage_config().adapter, fp8=None)  # what only the first build takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunks = build_chunks(run, ranks, adapter=run.stage_config().adapter, fp8=None)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    weights = sum(module.frozen.dense().numel() for c in chunks for module in c.modules() if hasattr(module, "frozen"))
    print(2 * weights, grown)
    runtime.stop()


if __name__ == "__main__":
    _print_peak()
