"""The default engine: transformers, in this process, on a CPU or one GPU.

Requests are sorted by length and decoded in left-padded batches with a KV cache. A prompt that is asked several times
(samples) is read once; rows that have finished leave the batch.
"""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.data.tokenizer import apply_template, end_of_turn, load_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.inference.model_files import check_model_dir
from megatron_medllm.inference.protocol import Completion, FinishReason, Request, finish

_STOP_CHECK_STEPS = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


class TransformersEngine:
    """A causal language model and its tokenizer, loaded from an HF directory."""

    def __init__(self, config: EngineConfig, model_dir: Path) -> None:
        check_model_dir(model_dir)
        transformers.utils.logging.disable_progress_bar()
        self._config, self._directory = config, model_dir
        device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = load_tokenizer(model_dir)
            model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=_DTYPES[config.dtype])
            self._model = model.to(device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{model_dir}: cannot be loaded ({_first_line(error)})") from error
        self._device = torch.device(device)
        self.eos = self._eos_ids()
        self._line_ends: dict[int, bool] = {}
        # transformers renamed it in 5.24 and warns of the old name.
        parameters = inspect.signature(self._model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._context = _context_length(self._model.config)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": self._device.type,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def close(self) -> None:
        """See `Engine.close`."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `Engine.generate`."""
        encoded = list(zip(requests, self._encode(requests), strict=True))
        for request, ids in encoded:
            self._check_length(request, len(ids))
        # Samples of one prompt stay together, so that their prompt is read once.
        encoded.sort(key=lambda item: (item[0].max_new_tokens, len(item[1]), item[1]))
        for batch in self.batches(encoded):
            try:
                yield from self._decode(batch)
            except torch.cuda.OutOfMemoryError:
                raise UserError(
                    f"the GPU is out of memory with {len(batch)} sequences; "
                    "lower engine.batch_tokens or engine.batch_size"
                ) from None

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of every request. A chat template writes the special tokens itself."""
        chat = [request for request in requests if request.messages]
        if chat and not self.tokenizer.chat_template:
            raise UserError("prompt.chat is set, but the model's tokenizer has no chat template; set prompt.chat=false")
        if chat:
            self._end_turns()
        templated = [
            apply_template(self.tokenizer, list(r.messages), directory=self._directory, thinking=r.thinking)
            for r in chat
        ]
        plain = [request.prompt for request in requests if not request.messages]
        chat_ids = iter(self.tokenizer(templated, add_special_tokens=False)["input_ids"] if templated else [])
        plain_ids = iter(self.tokenizer(plain)["input_ids"] if plain else [])
        return [next(chat_ids if request.messages else plain_ids) for request in requests]

    def _check_length(self, request: Request, length: int) -> None:
        if length == 0:
            raise UserError(f"{request.request_id}: the prompt is empty")
        if self._context and length + request.max_new_tokens > self._context:
            raise UserError(
                f"{request.request_id}: {length} prompt tokens + {request.max_new_tokens} new ones exceed the model's "
                f"context of {self._context}; lower decoding.max_new_tokens or prompt.shots"
            )

    def _eos_ids(self) -> list[int]:
        found: set[int] = set()
        for value in (
            self._model.generation_config.eos_token_id,
            self._model.config.eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            found |= set(value) if isinstance(value, list | tuple) else ({value} if value is not None else set())
        return sorted(found)

    def _end_turns(self) -> None:
        """Stop at the template's end of turn too: a base model's configuration names the end of documents alone."""
        end = end_of_turn(self.tokenizer, directory=self._directory)
        ids = self.tokenizer.encode(end, add_special_tokens=False)
        if len(ids) == 1:
            self.eos = sorted({*self.eos, *ids})

    def batches(self, encoded: list[tuple[Request, list[int]]]) -> Iterator[list[tuple[Request, list[int]]]]:
        """Cut requests, sorted by length, into batches that stay within the engine's limits."""
        batch: list[tuple[Request, list[int]]] = []
        for request, ids in encoded:
            footprint = (len(batch) + 1) * (len(ids) + request.max_new_tokens)
            same_length = not batch or batch[0][0].max_new_tokens == request.max_new_tokens
            if batch and (
                len(batch) == self._config.batch_size or footprint > self._config.batch_tokens or not same_length
            ):
                yield batch
                batch = []
            batch.append((request, ids))
        if batch:
            yield batch

    @torch.inference_mode()
    def _prefill(self, batch: list[tuple[Request, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Read each distinct prompt once.

        Returns next-token logits [rows, vocab], attention mask [rows, longest prompt], and the cache, a row a request.
        """
        owners = {tuple(ids): None for _, ids in batch}
        prompts = list(owners)
        row_of = {ids: row for row, ids in enumerate(prompts)}
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        cache = DynamicCache(config=self._model.config)
        logits = self.forward(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if len(prompts) == len(batch):
            return logits, mask, cache
        rows = torch.tensor([row_of[tuple(ids)] for _, ids in batch], device=self._device)
        cache.batch_select_indices(rows)
        return logits[rows], mask[rows], cache

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits of the last position, float32 [rows, vocab]."""
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def _decode(self, batch: list[tuple[Request, list[int]]]) -> Iterator[Completion]:
        steps = batch[0][0].max_new_tokens
        logits, mask, cache = self._prefill(batch)
        mask = torch.cat([mask, mask.new_ones(len(batch), steps)], dim=1)
        width = mask.shape[1] - steps
        eos = torch.tensor(self.eos, device=self._device)
        draws = _uniform_draws([request for request, _ in batch], steps)
        written: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))  # batch indices still decoding, in the order of the cache
        for step in range(steps):
            tokens = choose_tokens(logits, [batch[row][0] for row in rows], draws[rows, step])
            ended = torch.isin(tokens, eos).tolist()
            for row, token in zip(rows, tokens.tolist(), strict=True):
                written[row].append(token)
            keep = []
            for index, row in enumerate(rows):
                done = self._finished(batch[row], written[row], ended=ended[index], last=step == steps - 1)
                if done is None:
                    keep.append(index)
                else:
                    yield done
            if not keep:
                return
            if len(keep) < len(rows):
                rows = [rows[index] for index in keep]
                selected = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(selected)
                tokens, mask = tokens[selected], mask[selected]
            seen = mask[:, : width + step + 1]
            logits = self.forward(tokens[:, None], seen, seen.sum(1, keepdim=True) - 1, cache)

    def _finished(
        self, item: tuple[Request, list[int]], tokens: list[int], *, ended: bool, last: bool
    ) -> Completion | None:
        """The completion if the row is done, else None.

        Answers end with a line, so they are looked at when one was written; stop texts, every few tokens only.
        """
        request, prompt = item
        line_due = request.ends_as is not None and self._ends_line(tokens[-1])
        stop_due = bool(request.stop) and len(tokens) % _STOP_CHECK_STEPS == 0
        if not (ended or last or line_due or stop_due):
            return None
        text = str(self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True))
        reason: FinishReason
        text, reason = finish(text, request, "eos" if ended else "length")
        if not (ended or last or reason == "stop"):
            return None
        return Completion(request.request_id, text, reason, len(prompt), len(tokens))

    def _ends_line(self, token: int) -> bool:
        if token not in self._line_ends:
            self._line_ends[token] = "\n" in self.tokenizer.decode([token])
        return self._line_ends[token]


def _context_length(config: Any) -> int | None:
    """Tokens that the model was made for, as YaRN stretches them."""
    plain: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "yarn" or plain is None:
        return plain
    return max(plain, int(rope["factor"] * rope["original_max_position_embeddings"]))


def _uniform_draws(requests: list[Request], steps: int) -> np.ndarray:
    """One uniform number a row and step, from the row's own seed: float64 [rows, steps]."""
    if all(request.temperature == 0 for request in requests):
        return np.zeros((len(requests), steps))
    return np.stack([np.random.Generator(np.random.Philox(key=r.seed % 2**64)).random(steps) for r in requests])


def choose_tokens(logits: torch.Tensor, requests: list[Request], draws: np.ndarray) -> torch.Tensor:
    """Next token of each row, int64 [rows]: the likeliest, or by inverse transform sampling from `draws`."""
    greedy = logits.argmax(-1)
    temperatures = [request.temperature for request in requests]
    if not any(temperatures):
        return greedy
    scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
    probabilities = (logits / scale[:, None]).softmax(-1)
    if any(request.top_p < 1 for request in requests):
        top_p = torch.tensor([request.top_p for request in requests], device=logits.device)
        probabilities = keep_nucleus(probabilities, top_p)
    cumulative = probabilities.double().cumsum(-1)
    target = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    sharp = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    return torch.where(sharp, greedy, sampled)


def keep_nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p[:, None], 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
