"""Preference pairs, tokenized: prompts and answers as ids, with the end that each answer has in its template."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer

from megatron_medllm.account import Account
from megatron_medllm.config.base import Switch
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.pair_file import Message, PairText, read_pairs
from megatron_medllm.errors import UserError
from megatron_medllm.storage import digest_value, read_json

# Answers whose normalized edit distance is below this are reported as near-identical (arXiv 2402.13228, section 3).
NEAR_IDENTICAL = 0.1


@dataclass(frozen=True)
class Response:
    """A response's tokens, and which of them count in the preference term."""

    ids: np.ndarray  # [k] int64
    preferred: np.ndarray  # [k] bool


@dataclass(frozen=True)
class Pair:
    """A tokenized pair. `row` is its line in the file, from 0: the name under which everything else knows it.

    `question`: what tells its question from others, the file's name for it and the whole prompt. Pairs that share one
    of them answer the same question.
    """

    row: int
    prompt: np.ndarray  # [n] int64, n >= 1
    chosen: Response
    rejected: Response
    weight: float
    question: tuple[str, ...] = ()

    def packed_length(self, *, share_prompt: bool) -> int:
        """Tokens that the pair takes in a stream."""
        prompts = 1 if share_prompt else 2
        return prompts * (len(self.prompt) - 1) + len(self.chosen.ids) + len(self.rejected.ids)


@dataclass(frozen=True)
class PairSet:
    """The pairs that will train, and why the others will not."""

    pairs: list[Pair]
    dropped: list[tuple[int, str]]  # (row, reason)
    near_identical: list[tuple[int, float]]  # (row, normalized edit distance of the answers), dropped or not
    account: Account  # of the file's pairs: kept, and lost with the first line of each reason

    def report(self) -> dict[str, Any]:
        """What was kept, what was dropped and why, and what sharing prompts saves; JSON-able."""
        shared, unshared = (
            sum(pair.packed_length(share_prompt=share) for pair in self.pairs) for share in (True, False)
        )
        return {
            "pairs": len(self.pairs),
            "dropped": Counter(reason for _, reason in self.dropped),
            "near_identical": len(self.near_identical),
            "tokens_side_by_side": unshared,
            "tokens_with_shared_prompts": shared,
            "saved_by_sharing": round(1 - shared / unshared, 4),
            "account": self.account.to_json(),
            "dropped_rows": [{"row": row, "reason": reason} for row, reason in self.dropped],
            "near_identical_rows": [{"row": row, "edit_distance": round(d, 4)} for row, d in self.near_identical],
        }


def load_pairs(config: RpoConfig, tokenizer_dir: Path, *, cut_length: int, share_prompt: bool = True) -> PairSet:
    """Read and tokenize `config.pairs`.

    Args:
        config: paths, template, masks and what happens to long pairs.
        tokenizer_dir: HF directory with tokenizer.json.
        cut_length: tokens that a packed stream can hold.
        share_prompt: whether a pair takes one copy of its prompt in that stream, or two.

    Raises:
        UserError: a row cannot be understood (see `read_pairs`), the tokenizer lacks what the template needs, or no
            pair is left.
    """
    encode = _Encoder(config, tokenizer_dir)
    pairs: list[Pair] = []
    dropped: list[tuple[int, str]] = []
    near_identical: list[tuple[int, float]] = []
    account = Account("pairs")
    account.subject(str(config.pairs))
    for text in read_pairs(config.pairs):
        pair = encode(text)
        distance = Levenshtein.normalized_distance(pair.chosen.ids.tolist(), pair.rejected.ids.tolist())
        if distance < NEAR_IDENTICAL:
            near_identical.append((text.row, distance))
        if distance == 0:
            reason: str | None = "answers identical"
        elif distance < config.filters.min_edit_distance:
            reason = "answers nearly identical"
        else:
            pair, reason = _fit(pair, config, cut_length, share_prompt=share_prompt)
        if reason:
            dropped.append((text.row, reason))
            account.lose(str(config.pairs), reason, text.where)
        else:
            pairs.append(pair)
            account.keep(str(config.pairs))
    account.require("see rpo.sequence_length, rpo.too_long and rpo.filters.min_edit_distance")
    return PairSet(pairs, dropped, near_identical, account)


def _fit(pair: Pair, config: RpoConfig, cut_length: int, *, share_prompt: bool) -> tuple[Pair, str | None]:
    """Never cut an answer: drop the pair, or cut its prompt from the left."""
    excess = pair.packed_length(share_prompt=share_prompt) - cut_length
    if excess <= 0:
        return pair, None
    if config.too_long == "drop":
        return pair, f"longer than {cut_length} tokens"
    cut = -(-excess // (1 if share_prompt else 2))
    if cut > len(pair.prompt) - 1:
        return pair, f"answers alone are longer than {cut_length} tokens"
    return replace(pair, prompt=pair.prompt[cut:]), None


class _Encoder:
    """Texts of pairs to ids."""

    def __init__(self, config: RpoConfig, tokenizer_dir: Path) -> None:
        path = tokenizer_dir / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; the model's directory must hold its tokenizer")
        if config.thinking != "auto" and config.template != "chat":
            raise UserError(f"rpo.thinking={config.thinking} is a chat template's switch: set rpo.template=chat")
        if config.template not in ("plain", "chat"):
            raise UserError(f"rpo.template={config.template!r}: expected 'plain' or 'chat'")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._masks = [_compile(pattern) for pattern in config.mask_patterns]
        self._template: Callable[[list[Message]], str] | None = None
        self._end: list[int] = []
        if config.template == "chat":
            self._template, end_of_turn = _chat_template(
                tokenizer_dir, needs_end=config.add_eos, thinking=config.thinking
            )
            self._end = self._ids(end_of_turn) if config.add_eos else []
        elif config.add_eos:
            self._end = [_eos_id(tokenizer_dir)]

    def __call__(self, text: PairText) -> Pair:
        prompt = np.array(self._ids(self._prompt(text)), dtype=np.int64)
        if len(prompt) == 0:
            raise UserError(f"{text.where}: the prompt has no tokens")
        return Pair(
            row=text.row,
            prompt=prompt,
            chosen=self._response(text.chosen, f"{text.where}: field 'chosen'", ended=text.chosen_ended),
            rejected=self._response(text.rejected, f"{text.where}: field 'rejected'", ended=text.rejected_ended),
            weight=text.weight,
            question=_question(text),
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _prompt(self, text: PairText) -> str:
        if self._template is None:
            if isinstance(text.prompt, list):
                raise UserError(f"{text.where}: the pair holds messages: set rpo.template=chat")
            return text.prompt
        turns = text.prompt if isinstance(text.prompt, list) else [{"role": "user", "content": text.prompt}]
        return self._template(turns)

    def _response(self, text: str, where: str, *, ended: bool) -> Response:
        """An answer with its end, once: where the text brings it, it gets no second."""
        ids = self._ids(text)
        stripped = self._ids(text.rstrip())
        if self._end and stripped[-len(self._end) :] == self._end:
            return _response(self._tokenizer, text.rstrip(), self._masks, [])  # `<|im_end|>\n` ends with `<|im_end|>`
        if not ids:
            raise UserError(f"{where} has no tokens")
        return _response(self._tokenizer, text, self._masks, self._end if ended else [])


def _question(text: PairText) -> tuple[str, ...]:
    prompt = text.prompt.strip() if isinstance(text.prompt, str) else text.prompt
    named = () if text.question is None else (f"id:{text.question}",)
    return (*named, f"prompt:{digest_value(prompt)[:16]}")


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"rpo.mask_patterns: {pattern!r} is not a regular expression ({error})") from None


def _chat_template(
    tokenizer_dir: Path, *, needs_end: bool, thinking: Switch
) -> tuple[Callable[[list[Message]], str], str]:
    """The template as a function of a prompt's messages, and what it writes behind an answer."""
    # transformers is slow to import
    from megatron_medllm.data.tokenizer import apply_template, end_of_turn, load_tokenizer

    chat = load_tokenizer(tokenizer_dir)
    if chat.chat_template is None:
        raise UserError(f"{tokenizer_dir}: rpo.template=chat, but the tokenizer has no chat template")

    def render(turns: list[Message]) -> str:
        return apply_template(chat, turns, directory=tokenizer_dir, thinking=thinking)

    end = end_of_turn(chat, directory=tokenizer_dir) if needs_end else ""
    if needs_end and not end:
        raise UserError(
            f"{tokenizer_dir}: the chat template ends no turn and the tokenizer has no eos_token; set rpo.add_eos=false"
        )
    return render, end


def _eos_id(tokenizer_dir: Path) -> int:
    """The end token that a base model was trained with: generation_config's or config's eos, never a guess."""
    for name in ("generation_config.json", "config.json"):
        path = tokenizer_dir / name
        if not path.is_file():
            continue
        config = read_json(path)
        eos = config.get("eos_token_id") if isinstance(config, dict) else None
        if isinstance(eos, list):
            eos = eos[0] if eos else None
        if eos is None:
            continue
        if isinstance(eos, bool) or not isinstance(eos, int) or eos < 0:
            raise UserError(f"{path}: eos_token_id is {eos!r}, expected a token id")
        return eos
    raise UserError(
        f"{tokenizer_dir}: neither generation_config.json nor config.json has an eos_token_id; set rpo.add_eos=false"
    )


def _response(tokenizer: Tokenizer, text: str, masks: list[re.Pattern], tail: list[int]) -> Response:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    preferred = np.ones(len(encoding.ids) + len(tail), dtype=bool)
    for mask in masks:
        for match in mask.finditer(text):
            for index, (start, end) in enumerate(encoding.offsets):
                if start < match.end() and end > match.start():
                    preferred[index] = False
    return Response(np.array([*encoding.ids, *tail], dtype=np.int64), preferred)
