"""The optimizer step in few calls against Megatron-Core's own, tensor by tensor."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.train import AdapterConfig, OptimizerConfig
from megatron_medllm.parallel import foreach, mcore, runtime
from tests.worlds.shapes import tiny_shape

SHAPE = tiny_shape(num_layers=2, hidden_size=128, ffn_hidden_size=256, vocab_size=96)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    runtime.start(LayoutConfig(), seed=0)
    yield
    runtime.stop()


def tensors(*dtypes: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((16, 33), (7,), (128,), (1, 1))
    return [(scale * torch.randn(sizes[i % 4], generator=generator)).to(dtype) for i, dtype in enumerate(dtypes)]


FP32, BF16 = torch.float32, torch.bfloat16


def norms(*dtypes: torch.dtype, scale: float = 1.0) -> tuple[float, float]:
    flag, lists = torch.zeros(1, dtype=torch.int), [tensors(*dtypes, scale=scale)]
    megatrons = foreach.MEGATRONS[0](2048, flag, lists, False)[0]
    ours = foreach.multi_tensor_l2norm(2048, flag, lists, False)[0]
    assert ours.shape == megatrons.shape == (1,) and ours.dtype is megatrons.dtype is FP32
    return ours.item(), megatrons.item()


def test_the_norm_is_megatrons_bitwise():
    ours, megatrons = norms(*[FP32] * 7)
    assert ours == megatrons > 0
    assert norms(FP32, scale=0.0) == (0.0, 0.0)


def test_the_norm_of_mixed_dtypes_is_taken_in_fp32():
    ours, megatrons = norms(FP32, BF16, FP32, torch.float16)
    exact = math.sqrt(sum(t.double().square().sum().item() for t in tensors(FP32, BF16, FP32, torch.float16)))
    assert ours == pytest.approx(exact, rel=1e-6)
    assert megatrons == pytest.approx(exact, rel=1e-2)  # Megatron rounds a bf16 tensor's norm to bf16


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float):
    lists = [tensors(FP32, FP32)]
    lists[0][1][3] = bad
    norm = foreach.multi_tensor_l2norm(2048, torch.zeros(1), lists, False)[0].item()
    assert math.isinf(norm) if math.isinf(bad) else math.isnan(norm)


def test_the_norm_of_no_gradients_is_zero():
    assert foreach.multi_tensor_l2norm(2048, torch.zeros(1), [[]], False)[0].tolist() == [0.0]


def within_one_rounding(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.0])
@pytest.mark.parametrize("dtypes", [(FP32,) * 5, (FP32, BF16, FP32), ()])
def test_scaling_is_megatrons(dtypes: tuple[torch.dtype, ...], scale: float):
    ours, megatrons, elsewhere = (tensors(*dtypes) for _ in range(3))
    foreach.multi_tensor_scale(2048, torch.zeros(1), [ours, ours], scale)
    foreach.MEGATRONS[1](2048, torch.zeros(1), [megatrons, megatrons], scale)
    foreach.multi_tensor_scale(2048, torch.zeros(1), [tensors(*dtypes), elsewhere], scale)
    for own, theirs, other in zip(ours, megatrons, elsewhere, strict=True):
        # fp32, as Megatron's gradients are, to the bit; in bf16 torch's in-place kernel may round the other way
        assert (torch.equal if own.dtype is FP32 else within_one_rounding)(own, theirs)
        assert (torch.equal if own.dtype is FP32 else within_one_rounding)(other, theirs)


def test_copies_between_dtypes():
    sources, targets = tensors(FP32, FP32, BF16, FP32), tensors(BF16, FP32, FP32, torch.float16, scale=0.0)
    foreach.copy_each(sources, targets)
    for source, target, dtype in zip(sources, targets, (BF16, FP32, FP32, torch.float16), strict=True):
        assert target.dtype is dtype and torch.equal(target, source.to(dtype))
    foreach.copy_each([], [])


def build(choice: Any, *, dtype: str, adapter: bool, distributed: bool) -> tuple[list[nn.Module], Any]:
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.models.initialize import initialize_weights

    layout = LayoutConfig(distributed_optimizer=distributed)
    chunks = build_model(ModelConfig(shape=SHAPE, dtype=dtype), layout, device=torch.device("cpu"))
    initialize_weights(chunks, seed=1, tp_rank=0, tp_size=1)
    config = unwrap(chunks[0]).config
    if adapter:
        add_adapters([unwrap(chunks[0])], AdapterConfig(rank=4), seed=2, tp_rank=0, tp_size=1)
    chunks = mcore.wrap_ddp(chunks, config, layout)
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    return chunks, mcore.build_optimizer(chunks, config, settings, layout, helpers=choice)


def run_steps(chunks: list[nn.Module], optimizer: Any, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for parameter in chunks[0].parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        found.append(mcore.gradient_norm(optimizer))
        mcore.clip_and_step(optimizer, norm=found[-1], clip_grad=1.0 if step else 1e6)
    return found


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("dtype", "adapter"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_steps_are_megatrons_bitwise(dtype: str, adapter: bool, distributed: bool):
    results = {}
    for choice in ("megatron", "foreach", "auto"):
        chunks, optimizer = build(choice, dtype=dtype, adapter=adapter, distributed=distributed)
        before = [p.detach().clone() for p in chunks[0].parameters() if p.requires_grad]
        found = run_steps(chunks, optimizer, 3)
        after = [p.detach().clone() for p in chunks[0].parameters() if p.requires_grad]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        results[choice] = (found, after)
        mcore.release(chunks)
    for choice in ("foreach", "auto"):
        assert results[choice][0] == results["megatron"][0]
        assert all(torch.equal(a, b) for a, b in zip(results[choice][1], results["megatron"][1], strict=True))


def test_kept_views_follow_a_tensor_that_moves():
    chunks, optimizer = build("foreach", dtype="bfloat16", adapter=True, distributed=True)
    twin_chunks, twin = build("megatron", dtype="bfloat16", adapter=True, distributed=True)
    run_steps(chunks, optimizer, 1)
    run_steps(twin_chunks, twin, 1)
    for parameter in [*chunks[0].parameters(), *twin_chunks[0].parameters()]:
        if parameter.requires_grad:
            parameter.main_grad = parameter.main_grad.clone()  # no longer where the kept views look
    foreach.use(twin, "megatron")
    run_steps(twin_chunks, twin, 2)
    foreach.use(optimizer, "foreach")
    run_steps(chunks, optimizer, 2)
    for own, other in zip(chunks[0].parameters(), twin_chunks[0].parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_runs_is_what_was_chosen(caplog: pytest.LogCaptureFixture):
    from megatron.core.optimizer import clip_grads

    with caplog.at_level("INFO", logger="megatron_medllm.parallel.foreach"):
        for choice, norm in (("megatron", foreach.MEGATRONS[0]), ("auto", foreach.multi_tensor_l2norm)):
            _, optimizer = build(choice, dtype="bfloat16", adapter=True, distributed=True)
            assert clip_grads.l2_norm_impl is norm
            (leaf,) = foreach.leaves(optimizer)
            assert ("_copy_main_params_to_model_params" in vars(leaf)) == (choice == "auto")
    assert [line.split("copies ")[1] for line in caplog.messages] == [
        "one by one (asked for: megatron)",
        "in one call (asked for: auto)",
    ]


def test_a_rank_without_parameters_steps_too():
    """A pipeline stage with nothing to train has an optimizer without parameters, and still takes part in the norm."""
    from megatron_medllm.models.gpt import build_model, unwrap

    layout = LayoutConfig()
    chunks = build_model(ModelConfig(shape=SHAPE, dtype="bfloat16"), layout, device=torch.device("cpu"))
    chunks[0].requires_grad_(False)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=1e-2), layout, helpers="foreach")
    optimizer.zero_grad()
    assert mcore.gradient_norm(optimizer) == 0.0
    mcore.clip_and_step(optimizer, norm=0.0, clip_grad=1.0)
