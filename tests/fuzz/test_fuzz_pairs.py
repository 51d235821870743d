"""Pairs as users bring them: every text of a row is in the pair that is read, or the row is refused by line."""

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_medllm.config.train import OptimizerConfig, RpoConfig
from megatron_medllm.data.pair_file import PairText, read_pairs
from megatron_medllm.data.pairs import load_pairs
from tests.fuzz.surface import fuzz, right_or_one_line

TEXTS = st.text(alphabet=st.sampled_from("ab答え:\n 𠮷\u0000\ud800é,"), max_size=6) | st.sampled_from(
    ["問題: x\n答え:", "c<|im_end|>", "<|endoftext|>", " "]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "observation", "User", None])
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "text", "image_url"]), "text": TEXTS}), max_size=2
)
CONTENT = st.one_of(TEXTS, TEXTS, PARTS, JSON)
EXTRA = st.dictionaries(st.sampled_from(["name", "tool_calls", "weight"]), st.none() | st.just([]) | JSON, max_size=1)
MESSAGES = st.builds(
    lambda message, extra: extra | message,
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT})
    | st.fixed_dictionaries({"from": ROLES, "value": CONTENT}),
    EXTRA,
)
SIDES = st.one_of(TEXTS, MESSAGES, st.lists(MESSAGES, max_size=4), JSON)


def _talk(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Whole rows that are nearly right: shared turns, answers, and now and then one thing wrong."""
    words = st.text(alphabet="abc答", min_size=1, max_size=3)
    turns = draw(st.lists(words, min_size=1, max_size=5))
    shared = _talk(turns)
    answers = [[{"role": "assistant", "content": draw(words)}] for _ in range(2)]
    cut = draw(st.integers(0, len(shared)))
    row: dict[str, Any] = {"chosen": shared[cut:] + answers[0], "rejected": shared[cut:] + answers[1]}
    if cut:
        row["prompt"] = shared[:cut]
    if draw(st.booleans()):
        row[draw(st.sampled_from(["prompt", "chosen", "rejected", "system", "weight", "messages"]))] = draw(SIDES)
    return row


ROWS = conversations() | st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "conversations", "messages", "weight", "chosen_ended", "system"]),
    SIDES,
    min_size=2,
)


def texts_of(value: Any) -> list[str]:
    """Every text that a side says."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    if isinstance(value, dict):
        return [text for name in ("content", "value", "text") for text in texts_of(value.get(name))]
    return []


def check_nothing_vanished(row: dict[str, Any], pair: PairText) -> None:
    prompt = pair.prompt if isinstance(pair.prompt, str) else "".join(turn["content"] for turn in pair.prompt)
    assert pair.chosen and pair.rejected and prompt
    for name in ("prompt", "conversations", "messages", "chosen", "rejected"):
        for text in texts_of(row.get(name)):
            assert text in prompt + pair.chosen + pair.rejected, (name, text)
    assert texts_of(row["chosen"])[-1] in pair.chosen and texts_of(row["rejected"])[-1] in pair.rejected


@fuzz("preference pairs", row=ROWS)
def test_rows(folder: Path, row: dict[str, Any]) -> None:
    path = folder / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    outcome = right_or_one_line(lambda: list(read_pairs(path)))
    if outcome.refusal is None:
        (pair,) = outcome.value
        check_nothing_vanished(row, pair)
    else:
        assert outcome.refusal.startswith(f"{path}:1: ")


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes, int, bool]:
    """(name, content, pairs that it holds, whether it was damaged)."""
    count = draw(st.integers(1, 4))
    rows = [{"prompt": "答え" * n, "chosen": f"{n}", "rejected": "b"} for n in range(1, count + 1)]
    if draw(st.booleans()):
        text = json.dumps(rows, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    else:
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + draw(st.sampled_from(["", end]))
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-8-sig", "utf-16", "shift_jis"]))
    data = text.encode(encoding)
    packed = draw(st.sampled_from([bytes, gzip.compress, zstandard.compress]))(data)
    damage = draw(st.sampled_from(["", "", "", "", "cut", "flip"]))
    if damage == "cut":
        packed = packed[: draw(st.integers(0, len(packed) - 1))]
    elif damage == "flip":
        at = draw(st.integers(0, len(packed) - 1))
        packed = packed[:at] + bytes([packed[at] ^ draw(st.integers(1, 255))]) + packed[at + 1 :]
    name = "pairs" + draw(
        st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet", "", ".jsonl", ".json"])
    )
    return name, packed, count, bool(damage)


@fuzz("files of pairs", case=files())
def test_files(folder: Path, case: tuple[str, bytes, int, bool]) -> None:
    name, content, count, damaged = case
    path = folder / name
    path.write_bytes(content)
    outcome = right_or_one_line(lambda: list(read_pairs(path)))
    if outcome.refusal is None and not damaged:
        assert [pair.prompt for pair in outcome.value] == ["答え" * n for n in range(1, count + 1)]
        assert [pair.chosen for pair in outcome.value] == [str(n) for n in range(1, count + 1)]


@lru_cache
def tokenizer_dir(place: Path, *, template: str | None, eos: str | None, config_eos: str) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(place)
    (place / "config.json").write_text(f'{{"eos_token_id": {config_eos}}}')
    return place


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPEN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
BROKEN = "{{ messages[0].nothing.there }}"
TEMPLATES = st.sampled_from([TURNS, TURNS, TURNS, OPEN, OPEN, BROKEN, None])
ANSWERS = st.sampled_from(
    ["a", "b\n", "c<|im_end|>", "c<|im_end|>\n", "d<|endoftext|>", "<|im_end|>", "答え: e", "長い" * 30]
)
GOOD_ROWS = st.fixed_dictionaries({"prompt": st.sampled_from(["q", "問題"]), "chosen": ANSWERS, "rejected": ANSWERS})


@fuzz(
    "tokenized pairs",
    rows=st.lists(GOOD_ROWS, min_size=1, max_size=3) | st.lists(GOOD_ROWS | ROWS, min_size=1, max_size=3),
    template=TEMPLATES,
    eos=st.sampled_from(["<|endoftext|>", None]),
    config_eos=st.sampled_from(["0", "0", "0", "[2, 0]", "[2, 0]", "null", "[]", '"x"']),
    kind=st.sampled_from(["plain", "chat"]),
    add_eos=st.booleans(),
    too_long=st.sampled_from(["drop", "cut_prompt"]),
    length=st.sampled_from([6, 40, 400]),
)
def test_tokenized(
    folder: Path, rows: list[dict[str, Any]], template: str | None, eos: str | None, config_eos: str, kind: str,
    add_eos: bool, too_long: str, length: int,
) -> None:  # fmt: skip
    """Kept and dropped are all there were; every answer that ended has its end once, and none without `add_eos`."""
    place = folder.parent / f"tokenizer-{abs(hash((template, eos, config_eos)))}"
    directory = tokenizer_dir(place, template=template, eos=eos, config_eos=config_eos)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RpoConfig(pairs=path, optimizer=OptimizerConfig(lr=1.0), sequence_length=length, global_batch_size=1,
                       template=kind, add_eos=add_eos, too_long=too_long)  # fmt: skip
    outcome = right_or_one_line(lambda: load_pairs(config, directory, cut_length=length))
    if outcome.refusal is not None:
        return
    found = outcome.value
    assert (
        len(found.pairs) + len(found.dropped) == len(rows) == found.account.subject(str(path)).kept + len(found.dropped)
    )
    mark, end = {"plain": ("<|im_end|>", 2) if config_eos == "[2, 0]" else ("<|endoftext|>", 0),
                 "chat": ("<|im_end|>", 2) if template == TURNS else ("<|endoftext|>", 0)}[kind]  # fmt: skip
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = {text.row: text for text in read_pairs(path)}
    for pair in found.pairs:
        text = texts[pair.row]
        for response, said in ((pair.chosen, text.chosen), (pair.rejected, text.rejected)):
            brought = add_eos and said.rstrip().endswith(mark)
            ids = tokenizer.encode(said.rstrip() if brought else said).ids
            assert response.ids.tolist() == ids + ([end] if add_eos and not brought else [])
