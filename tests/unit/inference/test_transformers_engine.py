from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.protocol import Request, cut_at_stop, request_seed
from megatron_medllm.inference.transformers_engine import TransformersEngine, choose_tokens, keep_nucleus

PROMPTS = [
    "ソラ病の主症状はどれか。",
    "a",
    "問題:カゼ病の禁忌薬はどれか。\na.甲薬\nb.乙薬\n答え:",
    "老人が転んだ。",
    "誤り",
]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(EngineConfig(device="cpu", batch_size=3), tiny_model)


def texts(engine: TransformersEngine, requests: list[Request]) -> dict[str, str]:
    return {done.request_id: done.text for done in engine.generate(requests)}


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> dict[str, list[int]]:
    """Greedy token ids of each prompt by transformers' own `generate`, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        found[prompt] = output[0, ids.shape[1] :].tolist()
    return found


def test_greedy_equals_transformers_generate(engine: TransformersEngine, alone: dict[str, list[int]]) -> None:
    """Batches, padding, cache and leaving rows change nothing."""
    expected = {prompt: engine.tokenizer.decode(ids, skip_special_tokens=True) for prompt, ids in alone.items()}
    assert texts(engine, [Request(p, p, max_new_tokens=24) for p in PROMPTS]) == expected
    assert len(set(expected.values())) > 1


def test_lengths_and_reasons(engine: TransformersEngine) -> None:
    done = {c.request_id: c for c in engine.generate([Request(p, p, max_new_tokens=5) for p in PROMPTS])}
    assert {c.new_tokens for c in done.values() if c.finish_reason == "length"} == {5}
    assert all(c.new_tokens < 5 or c.finish_reason in ("length", "eos") for c in done.values())
    assert done["a"].prompt_tokens == 1


def test_rows_end_at_end_of_text(tiny_model: Path, alone: dict[str, list[int]]) -> None:
    """Declare a token that some rows write to be end-of-text: those rows stop there, the others go on as before."""
    engine = TransformersEngine(EngineConfig(device="cpu"), tiny_model)
    end = alone[PROMPTS[0]][2]
    engine.eos = [end]
    for done in engine.generate([Request(p, p, max_new_tokens=24) for p in PROMPTS]):
        ids = alone[done.request_id]
        kept = ids[: ids.index(end)] if end in ids else ids
        assert done.text == engine.tokenizer.decode(kept, skip_special_tokens=True)
        assert done.finish_reason == ("eos" if end in ids else "length")
        assert done.new_tokens == (len(kept) + 1 if end in ids else 24)
    assert sum(end in ids for ids in alone.values()) in range(1, len(PROMPTS))


def test_stop_text_is_cut_off(engine: TransformersEngine) -> None:
    prompt = PROMPTS[0]
    whole = texts(engine, [Request("x", prompt, max_new_tokens=24)])["x"]
    mark = whole[3:5]
    (done,) = engine.generate([Request("x", prompt, max_new_tokens=24, stop=(mark,))])
    assert done.text == whole[: whole.index(mark)]
    assert done.finish_reason == "stop" and done.new_tokens < 24


def script_tokens(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine, text: str) -> list[int]:
    """Make the model write `text` after every prompt, whatever it would choose; its token ids."""
    ids = engine.tokenizer.encode(text)
    forward, steps = TransformersEngine.forward, iter(ids)

    def scripted(self: TransformersEngine, *arguments: torch.Tensor) -> torch.Tensor:
        logits = forward(self, *arguments)
        logits[:, next(steps)] = 1e9
        return logits

    monkeypatch.setattr(TransformersEngine, "forward", scripted)
    return ids


@pytest.mark.parametrize(
    ("mode", "text", "answer"),
    [
        ("answer_only", "\n c\n次の文", "\n c"),
        ("explained", "aは誤り。\n答え: c\nまた、次の文", "aは誤り。\n答え: c"),
    ],
)
def test_a_complete_answer_stops_its_row(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, mode: str, text: str, answer: str
) -> None:
    """The row stops with the line end: nothing behind it is generated, or paid for."""
    ids = script_tokens(monkeypatch, engine, text)
    upto = next(n for n in range(len(ids)) if answer + "\n" in engine.tokenizer.decode(ids[:n]))
    (done,) = engine.generate([Request("x", "問", max_new_tokens=len(ids) - 1, ends_as=mode)])
    assert (done.text, done.finish_reason, done.new_tokens) == (answer, "stop", upto)


def test_without_an_answer_it_is_cut_off(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = script_tokens(monkeypatch, engine, "aは誤り。\nbも誤り。\nc")
    (done,) = engine.generate([Request("x", "問", max_new_tokens=len(ids) - 1, ends_as="explained")])
    assert (done.finish_reason, done.new_tokens) == ("length", len(ids) - 1)


def test_samples_do_not_depend_on_the_batch(engine: TransformersEngine) -> None:
    requests = [
        Request(f"{i}-{k}", p, max_new_tokens=16, temperature=1.0, seed=request_seed(7, f"{i}-{k}"))
        for i, p in enumerate(PROMPTS)
        for k in range(3)
    ]
    together = texts(engine, requests)
    assert together == {k: v for r in reversed(requests) for k, v in texts(engine, [r]).items()}
    assert len({together[f"0-{k}"] for k in range(3)}) == 3
    reseeded = [Request("x", PROMPTS[0], max_new_tokens=16, temperature=1.0, seed=seed) for seed in (1, 2)]
    assert texts(engine, reseeded[:1]) != texts(engine, reseeded[1:])


def test_inverse_transform_sampling_literal() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(5, 1)
    draws = np.array([0.0, 0.49, 0.51, 0.79, 0.81])
    request = Request("x", "x", temperature=1.0)
    assert choose_tokens(logits, [request] * 5, draws).tolist() == [0, 0, 1, 1, 2]
    half = Request("x", "x", temperature=0.5)  # squares: 25, 9, 4 of 38
    assert choose_tokens(logits, [half] * 5, draws).tolist() == [0, 0, 0, 1, 1]
    cold = Request("x", "x", temperature=0.0)
    assert choose_tokens(logits[:2], [cold, request], np.array([0.9, 0.9])).tolist() == [0, 2]


def test_nucleus_literal() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3]] * 3)
    kept = keep_nucleus(probabilities, torch.tensor([0.5, 0.6, 1.0]))
    assert kept.tolist() == [
        pytest.approx([0.0, 0.5, 0.0]),
        pytest.approx([0.0, 0.5, 0.3]),
        pytest.approx([0.2, 0.5, 0.3]),
    ]


def test_batches_respect_the_budget(tiny_model: Path) -> None:
    engine = TransformersEngine(EngineConfig(device="cpu", batch_size=4, batch_tokens=100), tiny_model)
    items = [(Request(str(n), "", max_new_tokens=10), [1] * n) for n in (5, 6, 7, 8, 20, 60, 200)]
    items.append((Request("long", "", max_new_tokens=11), [1] * 5))
    sizes = [[len(ids) for _, ids in batch] for batch in engine.batches(items)]
    assert sizes == [[5, 6, 7, 8], [20], [60], [200], [5]]


def test_chat_needs_a_template(engine: TransformersEngine) -> None:
    request = Request("x", messages=({"role": "user", "content": "?"},))
    with pytest.raises(UserError, match="no chat template"):
        list(engine.generate([request]))
    engine.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    try:
        as_text = texts(engine, [Request("x", "<user>?<assistant>")])
        assert texts(engine, [request]) == as_text
    finally:
        engine.tokenizer.chat_template = None


def test_chat_answers_stop_at_the_templates_end_of_turn(tiny_model: Path, alone: dict[str, list[int]]) -> None:
    """A base model's configuration names the end of documents alone."""
    engine = TransformersEngine(EngineConfig(device="cpu"), tiny_model)
    prompt, position, end = next(
        (prompt, position, text)
        for prompt, ids in alone.items()
        for position, token in enumerate(ids)
        if position and token != 0 and ids.index(token) == position
        and (text := engine.tokenizer.decode([token])).strip() == text
        and engine.tokenizer.encode(text) == [token]
    )  # fmt: skip
    ended = "{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}".replace("END", end)
    engine.tokenizer.chat_template = "{% for m in messages %}" + ended + "{% endfor %}"
    (plain,) = engine.generate([Request("x", prompt, max_new_tokens=24)])
    (chat,) = engine.generate([Request("x", messages=({"role": "user", "content": prompt},), max_new_tokens=24)])
    assert (chat.finish_reason, chat.new_tokens) == ("eos", position + 1) and plain.new_tokens > position + 1
    assert chat.text == engine.tokenizer.decode(alone[prompt][:position])


@pytest.mark.filterwarnings("error:.*is deprecated")
def test_our_calls_are_not_deprecated(engine: TransformersEngine) -> None:
    assert len(texts(engine, [Request("x", PROMPTS[0], max_new_tokens=2)])) == 1


def test_a_template_that_refuses_is_one_line(engine: TransformersEngine) -> None:
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(UserError, match=r"the chat template cannot be used \(roles must alternate"):
            list(engine.generate([Request("x", messages=({"role": "user", "content": "?"},))]))
    finally:
        engine.tokenizer.chat_template = None


def test_too_long_is_refused_before_any_work(engine: TransformersEngine) -> None:
    with pytest.raises(UserError, match="112A1: 4 prompt tokens \\+ 4093 new ones exceed the model's context of 4096"):
        list(engine.generate([Request("112A1", "aaaa", max_new_tokens=4093)]))


def test_incomplete_model_directories(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        TransformersEngine(EngineConfig(), tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        TransformersEngine(EngineConfig(), tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds no weights"):
        TransformersEngine(EngineConfig(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds no tokenizer"):
        TransformersEngine(EngineConfig(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersEngine(EngineConfig(), tmp_path)


def test_cut_at_stop() -> None:
    assert cut_at_stop("abcabc", ("c", "b")) == ("a", True)
    assert cut_at_stop("abc", ("x",)) == ("abc", False)
    assert cut_at_stop("abc", ()) == ("abc", False)
