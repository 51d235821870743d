"""The same steps by transformers in float64, every document and every answer on its own: nothing of ours but the data.

One process and many may share a fault: positions that run on across documents, a decayed norm, a wrong order of heads.
This is what both are held against. An adapter's gradients follow from the merged weight's: with W + s B A and G the
gradient of it, dB = s G A^T and dA = s B^T G.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_medllm.certify.shrink import MARKER, SAVED_AFTER
from megatron_medllm.certify.whole import whole_tensors
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, OptimizerConfig, RpoConfig
from megatron_medllm.corpus.index import read_index
from megatron_medllm.data.number_words import END
from megatron_medllm.losses.rpo import PairLogprobs, rpo_loss

SIDES = ("chosen", "rejected")


def compute_truth(run: RunConfig, start: Path, out: Path) -> None:
    """Take the first SAVED_AFTER steps and leave OUT/truth.pt.

    Args:
        run: of one process.
        start: what one process recorded: which rows each step consumed, and the adapter as it began.
        out: folder of the result.
    """
    from transformers import AutoModelForCausalLM

    assert run.model.path is not None
    recorded = torch.load(start)
    model = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float64, attn_implementation="sdpa")
    model.train()
    config = run.stage_config()
    shape = run.model.resolve_shape()
    initial = whole_tensors([recorded], lambda rank: rank["initial"], shape)
    learner = _Learner(model, initial, scale=config.adapter.alpha / config.adapter.rank if config.adapter else None)
    objective: _Documents | _Pairs
    objective = _Pairs(run, config, model) if isinstance(config, RpoConfig) else _Documents(run, config, model)
    found: dict[str, Any] = {"losses": [], "grad_norms": [], "reference": getattr(objective, "reference", {})}
    for step in recorded["steps"][:SAVED_AFTER]:
        learner.put_in()
        model.zero_grad()
        found["losses"].append(objective.backward(step["consumed"]))
        gradients = learner.take_out()
        found.setdefault("gradients", {name: g.clone() for name, g in gradients.items()})
        found["grad_norms"].append(learner.update(gradients, config.optimizer))
    found["weights"] = {name: parameter.detach() for name, parameter in learner.trained.items()}
    torch.save(found, out / "truth.pt")


class _Learner:
    """What trains: all of the model's parameters, or the adapters' halves."""

    def __init__(self, model: nn.Module, initial: dict[str, Tensor], *, scale: float | None) -> None:
        self._scale = scale
        self._parameters = dict(model.named_parameters())
        if scale is None:
            self.trained = {name: self._parameters[name] for name in initial if name in self._parameters}
            return
        self._base = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.trained = {name: nn.Parameter(tensor.double()) for name, tensor in initial.items()}

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """(HF weight, A, B) of every adapted weight; q, k and v share their A, and so do gate and up."""
        found: list[tuple[str, Tensor, Tensor]] = []
        for name, half in self.trained.items():
            if name.endswith(".lora_b"):
                a_name, hf = name.removesuffix(".lora_b").split("|")
                found.append((hf, self.trained[f"{a_name}.lora_a"], half))
        return found

    @torch.no_grad()
    def put_in(self) -> None:
        """Merge the adapters into the model's weights."""
        if self._scale is not None:
            for hf, a, b in self._pairs():
                self._parameters[hf].copy_(self._base[hf] + self._scale * b @ a)

    @torch.no_grad()
    def take_out(self) -> dict[str, Tensor]:
        """The gradients of what trains, from the model's."""
        if self._scale is None:
            return {name: _gradient(parameter) for name, parameter in self.trained.items()}
        found = {name: torch.zeros_like(half) for name, half in self.trained.items()}
        names = {id(half): name for name, half in self.trained.items()}
        for hf, a, b in self._pairs():
            gradient = _gradient(self._parameters[hf])
            found[names[id(b)]] += self._scale * gradient @ a.t()
            found[names[id(a)]] += self._scale * b.t() @ gradient
        return found

    @torch.no_grad()
    def update(self, gradients: dict[str, Tensor], config: OptimizerConfig) -> float:
        """Clip by the norm over everything and step AdamW, which decays neither norms nor biases; the norm."""
        if not hasattr(self, "_optimizer"):
            decayed = [p for p in self.trained.values() if p.dim() > 1]
            spared = [p for p in self.trained.values() if p.dim() == 1]
            groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
            self._optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
            )
        norm: float = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        clip = min(1.0, config.clip_grad / (norm + 1e-6))
        for name, parameter in self.trained.items():
            parameter.grad = gradients[name] * clip
        self._optimizer.step()
        return norm


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class _Documents:
    """Continued pretraining: the mean over learned tokens, every document alone."""

    def __init__(self, run: RunConfig, config: CptConfig, model: nn.Module) -> None:
        self._config, self._model = config, model
        (prefix,) = [path.with_suffix("") for path in config.data[0].path.glob("*.bin")]
        index = read_index(prefix)
        self._tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=index.dtype).astype(np.int64)
        self._starts = np.cumsum([0, *index.lengths])

    def backward(self, rows: list[list[tuple[int, int, int, int]]]) -> float:
        parts = [self._labelled(*span[1:]) for row in rows for span in row]
        count = sum(int(learned.sum()) for _, learned in parts)
        total = 0.0
        for tokens, learned in parts:
            if learned.any():
                logits = self._model(input_ids=tokens[None, :-1]).logits[0][learned]
                lse = logits.logsumexp(-1)
                logprobs = logits.gather(1, tokens[1:][learned][:, None])[:, 0] - lse
                loss = (-logprobs + self._config.z_loss * lse.square()).sum() / count
                loss.backward()
                total += loss.item()
        return total

    def _labelled(self, document: int, offset: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens of a part of a document, and which of those behind the first are learned."""
        whole = self._tokens[self._starts[document] : self._starts[document + 1]]
        tokens = torch.from_numpy(whole[offset : offset + length].copy())
        learned = torch.ones(len(tokens) - 1, dtype=torch.bool)
        if self._config.loss_after:
            text, marker = f" {' '.join(map(str, whole))} ", f" {MARKER} "
            if marker in text:
                before = len(text[: text.index(marker)].split())
                learned[: length if offset else before + len(MARKER.split()) - 1] = False
        return tokens, learned


class _Pairs:
    """Preference optimization: every answer alone behind its prompt, against the model as it began."""

    def __init__(self, run: RunConfig, config: RpoConfig, model: nn.Module) -> None:
        self._config, self._model = config, model
        self._pairs = [json.loads(line) for line in config.pairs.read_text().splitlines()]
        with torch.no_grad():
            self.reference = {
                row: tuple(self._logprob(pair, side)[0].item() for side in SIDES)
                for row, pair in enumerate(self._pairs)
            }

    def _logprob(self, pair: dict[str, Any], side: str) -> tuple[Tensor, int]:
        """Sum over an answer's tokens, its end among them, and their number."""
        prompt = [int(word) for word in pair["prompt"].split()]
        answer = [int(word) for word in pair[side].split()] + [END] * self._config.add_eos
        logits = self._model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum(), len(answer)

    def backward(self, rows: list[int]) -> float:
        total = 0.0
        for row in rows:
            pair = self._pairs[row]
            (chosen, chosen_tokens), (rejected, rejected_tokens) = (self._logprob(pair, side) for side in SIDES)
            reference = self.reference[row] if self._config.loss.needs_reference else (0.0, 0.0)
            numbers = (*reference, chosen_tokens, rejected_tokens)
            reference_chosen, reference_rejected, n, m = (torch.tensor([x], dtype=torch.float64) for x in numbers)
            logprobs = PairLogprobs(
                chosen=chosen[None],
                rejected=rejected[None],
                chosen_full=chosen[None],
                reference_chosen=reference_chosen,
                reference_rejected=reference_rejected,
                chosen_tokens=n,
                rejected_tokens=m,
                chosen_full_tokens=n,
            )
            loss = rpo_loss(logprobs, self._config.loss)[0].sum() * pair["weight"] / len(rows)
            loss.backward()
            total += loss.item()
        return total
