"""Which kernel attends, and that what is handed to cuDNN means the same attention."""

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.kernels.attention import PlanCache, cudnn_ragged
from megatron_medllm.models import attention_choice
from megatron_medllm.models.attention import PackedAttention, attend_by_default, dense_sdpa, padded_sdpa
from megatron_medllm.models.attention_choice import (
    ONE_DOCUMENT,
    PAIR_AND_DOCUMENTS,
    CudnnAttention,
    choose_attention,
    disagreement,
    ragged_cudnn,
)
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.head import relative_error
from tests.worlds.ragged_cudnn import Graph, front_end
from tests.worlds.shapes import tiny_shape

CPU = torch.device("cpu")
SCALE = 1 / math.sqrt(16)
# Two documents, a pair behind its prompt, one token, four more documents: nine sequences for cuDNN.
MANY = (
    Segment(0, 30), Segment(30, 97), Segment(97, 140), Segment(140, 151, 97, 140), Segment(151, 190, 97, 140),
    Segment(190, 191), Segment(191, 320), Segment(320, 322), Segment(322, 400),
)  # fmt: skip


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that passes for a Hopper GPU with cuDNN's front end."""
    monkeypatch.setitem(sys.modules, "cudnn", front_end())
    monkeypatch.setattr(cudnn_ragged, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    cudnn_ragged.device_handle.cache_clear()
    yield
    cudnn_ragged.device_handle.cache_clear()


def pack(segments: tuple[Segment, ...]) -> PackedSequences:
    return PackedSequences.from_segments(segments, torch.zeros(segments[-1].end), backend="torch")


def gradients(attend: Any, segments: tuple[Segment, ...], heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    *inputs, upstream = (torch.randn(segments[-1].end, n, 16, generator=generator).bfloat16() for n in sizes)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves, pack(segments), SCALE)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("segments", [MANY, PAIR_AND_DOCUMENTS, ONE_DOCUMENT, (Segment(0, 1), Segment(1, 2))])
def test_ragged_tables_mean_the_same_attention(cudnn: None, segments: tuple[Segment, ...], heads: tuple[int, int]):
    plans = PlanCache(strict=True)
    found = gradients(lambda *a: ragged_cudnn(*a, plans), segments, heads, torch.bfloat16)
    expected = gradients(padded_sdpa, segments, heads, torch.float32)
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < 0.01 or (value - wanted).abs().max() < 0.02
    assert len(plans) == 1


def test_value_may_be_a_view_of_the_projection(cudnn: None):
    both = torch.randn(400, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, (key, value) = torch.randn(400, 8, 16).bfloat16(), both.chunk(2, dim=-1)
    found = ragged_cudnn(query, key, value, pack(MANY), SCALE, PlanCache(strict=True))
    assert relative_error(found, padded_sdpa(query.float(), key.float(), value.float(), pack(MANY), SCALE)) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_is_dense_attention(dtype: torch.dtype):
    expected = gradients(padded_sdpa, ONE_DOCUMENT, (6, 2), torch.float32)
    found = gradients(lambda q, k, v, packed, scale: dense_sdpa(q, k, v, scale), ONE_DOCUMENT, (6, 2), dtype)
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < (1e-5 if dtype == torch.float32 else 0.01)
    assert found[0].is_contiguous() or found[0].transpose(0, 1).is_contiguous()


def took(monkeypatch: pytest.MonkeyPatch, attend: CudnnAttention, segments: tuple[Segment, ...]) -> str:
    """Which of the three attended."""
    taken: list[str] = []

    def note(name: str, result: Any) -> Any:
        return lambda *_: (taken.append(name), result)[1]

    out = torch.zeros(1)
    monkeypatch.setattr(attention_choice, "dense_sdpa", note("dense", out))
    monkeypatch.setattr(attention_choice, "attend_by_default", note("flash", out))
    monkeypatch.setattr(attention_choice, "ragged_cudnn", note("ragged", out))
    query = torch.zeros(segments[-1].end, 1, 1, dtype=torch.bfloat16)
    attend(query, query, query, pack(segments), 1.0)
    return taken[0]


def test_a_stream_goes_to_the_kernel_that_fits_it(monkeypatch: pytest.MonkeyPatch):
    both = CudnnAttention(dense=True, plans=PlanCache())
    assert took(monkeypatch, both, (Segment(0, 512),)) == "dense"
    assert took(monkeypatch, both, (Segment(0, 511),)) == "ragged"  # too short to be worth a plan of torch's
    assert took(monkeypatch, both, (Segment(0, 400), Segment(400, 512))) == "ragged"
    assert took(monkeypatch, CudnnAttention(dense=True, plans=None), (Segment(0, 9), Segment(9, 600))) == "flash"
    assert took(monkeypatch, CudnnAttention(dense=False, plans=None), (Segment(0, 512),)) == "flash"


def test_torch_plans_only_so_many_lengths(monkeypatch: pytest.MonkeyPatch):
    attend = CudnnAttention(dense=True, plans=None)
    lengths = range(600, 600 + attention_choice.DENSE_LENGTHS + 1)
    assert [took(monkeypatch, attend, (Segment(0, n),)) for n in lengths] == ["dense"] * 16 + ["flash"]
    assert took(monkeypatch, attend, (Segment(0, 600),)) == "dense"


def test_fp32_stays_with_torch():
    attend = CudnnAttention(dense=True, plans=None)
    query, key = torch.randn(640, 2, 8), torch.randn(640, 1, 8)
    assert torch.equal(
        attend(query, key, key, pack(ONE_DOCUMENT), 1.0), padded_sdpa(query, key, key, pack(ONE_DOCUMENT), 1.0)
    )


def test_a_length_that_cudnn_refuses_is_left_to_flash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    attend, message = CudnnAttention(dense=True, plans=None), "No available kernel. Aborting execution."

    def refuses(*_: Any) -> Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(attention_choice, "dense_sdpa", refuses)
    query = torch.randn(640, 2, 16, dtype=torch.bfloat16)
    assert torch.equal(
        attend(query, query, query, pack(ONE_DOCUMENT), SCALE),
        padded_sdpa(query, query, query, pack(ONE_DOCUMENT), SCALE),
    )
    assert (attend.dense, len(caplog.records)) == (False, 1)
    message = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        CudnnAttention(dense=True, plans=None)(query, query, query, pack(ONE_DOCUMENT), SCALE)


def failing(key: Any, device: torch.device) -> Any:
    raise RuntimeError("No valid engine configs\nWarning: CUDNN_STATUS_NOT_SUPPORTED")


def test_a_plan_that_cannot_be_built_turns_ragged_off_with_one_warning(caplog: pytest.LogCaptureFixture):
    plans = PlanCache(failing, sightings=1)
    query = torch.randn(400, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    attend = CudnnAttention(dense=False, plans=plans)
    for _ in range(3):
        attend(query, query, query, pack(MANY), SCALE).sum().backward()  # by the default, on a CPU torch's SDPA
    assert plans.off is not None and "RuntimeError: No valid engine configs" in plans.off
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(UserError, match=r"kernels\.attention=cudnn: no plan for sequences=9 "):
        ragged_cudnn(query, query, query, pack(MANY), SCALE, PlanCache(failing, strict=True))


def test_cudnns_own_error_turns_ragged_off_too(cudnn: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Graph, "unsupported", True)
    plans = PlanCache(sightings=1)
    query = torch.randn(400, 2, 16, dtype=torch.bfloat16)
    assert ragged_cudnn(query, query, query, pack(MANY), SCALE, plans) is None
    assert str(plans.off).endswith("RuntimeError: cudnnGraphNotSupportedError: No valid engine configs")


def test_only_so_many_plans_are_built(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(cudnn_ragged, "MAX_PLANS", 2)
    plans = PlanCache(lambda key, device: f"plans of {key}", sightings=1)  # type: ignore[arg-type,return-value]
    assert [plans.get(key, CPU) for key in ("a", "b", "c", "d", "a")] == [  # type: ignore[arg-type]
        "plans of a", "plans of b", None, None, "plans of a",
    ]  # fmt: skip
    assert len(caplog.records) == 1


def test_plans_are_built_for_a_kind_that_comes_again(cudnn: None):
    """Two layers of a stream count once, and attend in the same way."""
    plans = PlanCache(sightings=3)
    query = torch.randn(400, 2, 16, dtype=torch.bfloat16)
    streams = [pack(MANY) for _ in range(4)]
    found = [[ragged_cudnn(query, query, query, s, SCALE, plans) is not None for _ in range(2)] for s in streams]
    assert found == [[False, False], [False, False], [True, True], [True, True]]
    assert ragged_cudnn(query, query, query, streams[0], SCALE, plans) is None  # recomputed as it was


def test_disagreement_is_found():
    arguments = (PAIR_AND_DOCUMENTS, CPU, torch.float32, (4, 2), 16)
    assert disagreement(padded_sdpa, *arguments, reference=padded_sdpa) is None
    nan = disagreement(lambda *a: padded_sdpa(*a) * float("nan"), *arguments, reference=padded_sdpa)
    assert nan == "output is off by nan of its size"

    def own_keys_only(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
        return padded_sdpa(q, k, v, pack(tuple(Segment(s.start, s.end) for s in packed.segments)), scale)

    assert str(disagreement(own_keys_only, *arguments, reference=padded_sdpa)).startswith("output is off by 0.")

    def no_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences, scale: float) -> Tensor:
        return padded_sdpa(q, k.detach() + 0 * k, v, packed, scale)

    assert disagreement(no_gradient_of_keys, *arguments, reference=padded_sdpa) == "d key is off by 1 of its size"
    assert disagreement(lambda *a: failing(a[0], CPU), *arguments, reference=padded_sdpa) == (
        "RuntimeError: No valid engine configs | Warning: CUDNN_STATUS_NOT_SUPPORTED"
    )


class Chunk(nn.Module):
    """Two layers' attention and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        config = type("Config", (), {"kv_channels": 16, "context_parallel_size": 1, "tensor_model_parallel_size": 2,
                                     "num_attention_heads": 8, "num_query_groups": 4,
                                     "params_dtype": torch.bfloat16})  # fmt: skip
        self.layers = nn.ModuleList([PackedAttention(config, 1), PackedAttention(config, 2)])


def test_a_cpu_keeps_torchs_attention_and_says_why(caplog: pytest.LogCaptureFixture):
    chunk = Chunk()
    with caplog.at_level(logging.INFO):
        choose_attention([chunk], "auto", CPU)
    assert [layer.attend for layer in chunk.layers] == [attend_by_default] * 2
    assert caplog.messages == [
        "attention: torch's SDPA of padded documents; cuDNN needs a CUDA device (this one is cpu) (asked for: auto)"
    ]
    with pytest.raises(UserError, match=r"^kernels.attention=cudnn needs a CUDA device \(this one is cpu\)$"):
        choose_attention([chunk], "cudnn", CPU)


@pytest.mark.parametrize(
    ("wanted", "front_end_missing", "ragged_breaks", "said"),
    [
        ("auto", None, False, "one document a stream: cuDNN; several: cuDNN"),
        ("auto", "a wheel", False, "one document a stream: cuDNN; several: flash (cuDNN: a wheel)"),
        ("auto", None, True, "one document a stream: cuDNN; several: flash (cuDNN: no plan for sequences=5 "),
        ("cudnn", None, False, "one document a stream: cuDNN; several: cuDNN"),
        ("flash", None, False, "torch's SDPA of padded documents"),
    ],
)
def test_what_passes_its_check_attends(
    cudnn: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    wanted: str, front_end_missing: str | None, ragged_breaks: bool, said: str,
):  # fmt: skip
    monkeypatch.setattr(attention_choice, "missing_dense", lambda *_: None)
    monkeypatch.setattr(attention_choice, "missing_front_end", lambda device: front_end_missing)
    monkeypatch.setattr(attention_choice.disagreement, "__defaults__", (padded_sdpa,))
    if ragged_breaks:
        monkeypatch.setattr(cudnn_ragged, "build_plans", failing)
    chunk = Chunk()
    with caplog.at_level(logging.INFO):
        choose_attention([chunk], wanted, CPU)  # type: ignore[arg-type]
    assert caplog.messages[-1].startswith(f"attention: {said}")
    assert caplog.messages[-1].endswith(f"(asked for: {wanted})")
    first = chunk.layers[0].attend
    assert all(layer.attend is first for layer in chunk.layers)
    if wanted == "flash":
        assert first is attend_by_default
    else:
        assert isinstance(first, CudnnAttention)
        assert (first.plans is not None) == (said.endswith("several: cuDNN"))


def test_an_explicit_choice_that_fails_its_check_is_refused(cudnn: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_choice, "missing_dense", lambda *_: None)
    monkeypatch.setattr(attention_choice, "missing_front_end", lambda device: None)
    monkeypatch.setattr(attention_choice.disagreement, "__defaults__", (padded_sdpa,))
    monkeypatch.setattr(cudnn_ragged, "build_plans", failing)
    with pytest.raises(UserError, match=r"kernels\.attention=cudnn: no plan for sequences=5 .*No valid engine configs"):
        choose_attention([Chunk()], "cudnn", CPU)
    monkeypatch.setattr(attention_choice, "missing_front_end", lambda device: "the wheel")
    with pytest.raises(UserError, match=r"^kernels\.attention=cudnn needs the wheel; auto takes"):
        choose_attention([Chunk()], "cudnn", CPU)


def test_the_run_file_decides():
    from megatron_medllm.train.model import build_chunks

    def built(wanted: str) -> list[nn.Module]:
        run = RunConfig.model_validate(
            {
                "run_dir": "unwritten",
                "model": {"dtype": "bfloat16", "shape": tiny_shape(hidden_size=64, ffn_hidden_size=64, vocab_size=96)},
                "kernels": {"attention": wanted},
                "cpt": {
                    "optimizer": {"lr": 0.01}, "sequence_length": 32, "global_batch_size": 4,
                    "data": [{"path": "unread"}], "train_tokens": 128,
                },
            }
        )  # fmt: skip
        ranks = runtime.start(run.layout, seed=0)
        try:
            return build_chunks(run, ranks, adapter=None, fp8=None)
        finally:
            runtime.stop()

    layers = [m for chunk in built("auto") for m in chunk.modules() if isinstance(m, PackedAttention)]
    assert layers and all(layer.attend is attend_by_default for layer in layers)
    assert {layer.dtype for layer in layers} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"^kernels\.attention=cudnn needs a CUDA device"):
        built("cudnn")
