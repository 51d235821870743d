"""Do two checkpoints hold the same model? Their logits on the same prompts, and what each would go on to write.

An HF directory is run by transformers, a Megatron checkpoint, ours or another tool's, by Megatron-Core's model:
comparing one with the other proves the conversion and the model at once. Each is loaded alone, so the memory needed is
that of the larger one.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medllm.checkpoint.open_model import OpenCheckpoint, open_checkpoint
from megatron_medllm.checkpoint.torch_dist import refuse_unsafe
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.config.model import ModelConfig, ModelShape, shape_from_hf_config
from megatron_medllm.data.tokenizer import load_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.storage import read_jsonl

LogitsOf = Callable[[Tensor], Tensor]  # token ids [t] int64 -> logits [t, v] float32


@dataclass(frozen=True)
class Comparison:
    """Differences of logits are absolute; `logit_scale` is the largest absolute logit of the first model."""

    prompts: int
    tokens: int
    max_difference: float
    mean_difference: float
    logit_scale: float
    same_continuations: int
    first_difference: str | None  # of continuations: the prompt and both texts (or token ids)
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether the logits differ by no more than the tolerance, relative to the logits' scale."""
        return self.max_difference <= self.tolerance * self.logit_scale

    def lines(self) -> list[str]:
        """The result for people."""
        relative = self.max_difference / self.logit_scale if self.logit_scale else 0.0
        verdict = "same model" if self.agree else "DIFFERENT"
        lines = [
            f"{verdict}: {self.prompts} prompts, {self.tokens} tokens",
            f"logits: largest difference {self.max_difference:.3g} ({relative:.3g} of the scale "
            f"{self.logit_scale:.3g}; tolerance {self.tolerance:g}), mean {self.mean_difference:.3g}",
            f"greedy continuations: {self.same_continuations} of {self.prompts} the same",
        ]
        return lines if self.first_difference is None else [*lines, self.first_difference]


def compare_checkpoints(
    first: Path,
    second: Path,
    prompts_file: Path,
    *,
    new_tokens: int = 16,
    tolerance: float = 1e-4,
    dtype: torch.dtype = torch.float32,
    source_dir: Path | None = None,
) -> Comparison:
    """Run both checkpoints on every prompt and on the first one's greedy continuation.

    Args:
        first: HF directory or Megatron checkpoint, as `open_checkpoint` takes it.
        second: likewise.
        prompts_file: one prompt a line; or `.jsonl` with `{"prompt": text}` or `{"ids": [...]}` rows.
        new_tokens: length of the greedy continuations.
        tolerance: largest difference of a logit, relative to the largest logit, that still counts as the same.
        dtype: in which both are computed; below float32, rounding alone exceeds the default tolerance.
        source_dir: HF directory with config.json and tokenizer for a checkpoint that carries none; default: the one of
            the two that is an HF directory.

    Raises:
        UserError: a checkpoint or the prompts cannot be read, or the vocabularies differ.
    """
    source_dir = source_dir or next((path for path in (first, second) if (path / "config.json").is_file()), None)
    tokenizer = _tokenizer(first, source_dir) or _tokenizer(second, source_dir)
    prompts = list(_read_prompts(prompts_file, tokenizer))
    total = 2 * len(prompts)
    with tempfile.TemporaryDirectory() as kept, progress("verify", total) as bar:
        texts: list[Tensor] = []
        with _opened(first, dtype, source_dir) as logits_of:
            for number, prompt in enumerate(prompts):
                texts.append(_continue(logits_of, prompt, new_tokens))
                torch.save(logits_of(texts[-1]), Path(kept) / f"{number}.pt")
                bar.update(number + 1, first.name)
        gc.collect()
        largest, summed, scale, count, same, difference = 0.0, 0.0, 0.0, 0, 0, None
        with _opened(second, dtype, source_dir) as logits_of:
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                expected = torch.load(Path(kept) / f"{number}.pt", weights_only=True)
                found = logits_of(text)
                if found.shape != expected.shape:
                    raise UserError(f"{second}: vocabulary of {found.shape[1]}, but {first} has {expected.shape[1]}")
                gap = (found - expected).abs()
                largest, scale = max(largest, gap.max().item()), max(scale, expected.abs().max().item())
                summed, count = summed + gap.double().sum().item(), count + gap.numel()
                other = _continue(logits_of, prompt, new_tokens)
                same += int(torch.equal(other, text))
                if difference is None and not torch.equal(other, text):
                    difference = f"prompt {number + 1}: {_show(text, tokenizer)} | {_show(other, tokenizer)}"
                bar.update(len(prompts) + number + 1, second.name)
    return Comparison(
        prompts=len(prompts),
        tokens=sum(map(len, texts)),
        max_difference=largest,
        mean_difference=summed / count,
        logit_scale=scale,
        same_continuations=same,
        first_difference=difference,
        tolerance=tolerance,
    )


def _continue(logits_of: LogitsOf, prompt: Tensor, new_tokens: int) -> Tensor:
    """The prompt and its most likely next tokens; [t + new_tokens] int64."""
    ids = prompt
    for _ in range(new_tokens):
        ids = torch.cat((ids, logits_of(ids)[-1].argmax()[None]))
    return ids


def _show(ids: Tensor, tokenizer: Any) -> str:
    return repr(tokenizer.decode(ids.tolist())) if tokenizer is not None else str(ids.tolist())


def _tokenizer(path: Path, source_dir: Path | None) -> Any:
    place = find_megatron(path)
    carried = path if place is None else place.tokenizer or source_dir
    return load_tokenizer(carried) if carried is not None and (carried / "tokenizer.json").exists() else None


def _read_prompts(path: Path, tokenizer: Any) -> Iterator[Tensor]:
    """Token ids [t] int64 of each prompt."""
    if path.suffix == ".jsonl":
        rows: list[dict] = list(read_jsonl(path))
    else:
        try:
            rows = [{"prompt": line} for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not rows:
        raise UserError(f"{path}: no prompts")
    for number, row in enumerate(rows, start=1):
        if "ids" in row:
            ids = row["ids"]
        elif "prompt" not in row:
            raise UserError(f"{path}:{number}: neither 'prompt' nor 'ids'")
        elif tokenizer is None:
            raise UserError(f"{path}:{number}: text, but neither checkpoint has a tokenizer; give 'ids'")
        else:
            ids = tokenizer(row["prompt"])["input_ids"]
        if not ids:
            raise UserError(f"{path}:{number}: an empty prompt")
        yield torch.tensor(ids)


def _opened(path: Path, dtype: torch.dtype, source_dir: Path | None) -> AbstractContextManager[LogitsOf]:
    if find_megatron(path) is None:
        return _transformers(path, dtype)
    return _megatron(path, dtype, source_dir)


@contextmanager
def _transformers(path: Path, dtype: torch.dtype) -> Iterator[LogitsOf]:
    from transformers import AutoModelForCausalLM

    shape_from_hf_config(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.to(device).eval()

    def logits_of(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(ids[None].to(device)).logits[0].float().cpu()

    yield logits_of


@contextmanager
def _megatron(path: Path, dtype: torch.dtype, source_dir: Path | None) -> Iterator[LogitsOf]:
    from megatron_medllm.parallel import runtime

    place = find_megatron(path)
    assert place is not None
    opened = open_checkpoint(path, None if place.writer == "medllm" else source_dir)
    if opened.adapter is not None:
        raise UserError(f"{path}: holds an adapter only; export it, merged into its base, and verify that")
    shape = opened.shape
    here = runtime.start(LayoutConfig(), seed=0)
    try:
        chunks = _build(shape, LayoutConfig(), dtype, here.device)
        _fill(chunks, opened)
        yield lambda ids: _megatron_logits(chunks[0], ids.to(here.device), shape)
    finally:
        runtime.stop()


def _fill(chunks: list, opened: OpenCheckpoint) -> None:
    """Ours by Megatron-Core's loader, as training resumes; others hold pickles that it would run: by our reader."""
    from megatron_medllm.checkpoint.hf_reader import load_hf_weights
    from megatron_medllm.parallel import mcore

    weights = opened.place.weights
    if opened.place.writer == "medllm":
        refuse_unsafe(weights)
        mcore.restore(chunks, None, mcore.load_sharded(mcore.sharded_state(chunks, None, is_loading=True), weights))
    else:
        load_hf_weights(chunks, weights, opened.shape, tp_rank=0, tp_size=1)


def _build(shape: ModelShape, layout: LayoutConfig, dtype: torch.dtype, device: torch.device) -> list:
    from megatron_medllm.models.gpt import build_model

    model = ModelConfig(shape=shape, dtype="float32" if dtype is torch.float32 else "bfloat16")
    return build_model(model, layout, device=device)


@torch.no_grad()
def _megatron_logits(chunk: torch.nn.Module, ids: Tensor, shape: ModelShape) -> Tensor:
    from megatron_medllm.parallel.packed import PackedSequences, Segment

    positions = torch.arange(len(ids), device=ids.device)
    packed = PackedSequences.from_segments((Segment(0, len(ids)),), positions, backend="torch")
    chunk.eval()
    logits = chunk(ids[None], positions[None], None, packed_seq_params=packed)  # [1, t, padded v]
    return logits[0, :, : shape.vocab_size].float().cpu()
