"""The switch of a chat template for thinking first, on its way to every engine and into training."""

import shutil
import sys
from pathlib import Path

import pytest

from megatron_medllm.config.exam import EngineConfig, PromptConfig
from megatron_medllm.config.run import load
from megatron_medllm.data.tokenizer import apply_template, end_of_turn, load_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.inference.engines import open_engine
from megatron_medllm.inference.protocol import Request, finish
from megatron_medllm.inference.vllm_worker import answer
from tests.worlds.exam import ScriptedEndpoint

# As Qwen3's does it: an empty thought stands before the answer where thinking is off.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASK = ({"role": "user", "content": "?"},)
PLAIN = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    model = shutil.copytree(tiny_model, tmp_path / "chat")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.mark.parametrize(("thinking", "ending"), [("auto", ""), ("on", ""), ("off", "<think>\n\n</think>\n\n")])
def test_the_template_is_told(chat_model: Path, thinking: str, ending: str):
    tokenizer = load_tokenizer(chat_model)
    assert apply_template(tokenizer, list(ASK), directory=chat_model, thinking=thinking) == PLAIN + ending
    assert end_of_turn(tokenizer, directory=chat_model) == "<|im_end|>"


def test_the_transformers_engine_asks_with_the_switch(chat_model: Path):
    engine = open_engine(EngineConfig(device="cpu"), chat_model)
    requests = [Request(name, messages=ASK, thinking=name, max_new_tokens=2) for name in ("auto", "on", "off")]
    lengths = {done.request_id: done.prompt_tokens for done in engine.generate(requests)}
    assert lengths["auto"] == lengths["on"] < lengths["off"]


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_a_template_without_the_switch_is_refused(
    chat_model: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "vllm.py").write_text("__version__ = 'x'\nclass LLM:\n    def __init__(self, **options): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (chat_model / "chat_template.jinja").write_text(TEMPLATE.replace("enable_thinking", "other"))
    engine = open_engine(EngineConfig(kind=kind, device="cpu", python=Path(sys.executable)), chat_model)
    try:
        with pytest.raises(UserError, match="the chat template has no switch `enable_thinking`"):
            list(engine.generate([Request("x", messages=ASK, thinking="off")]))
    finally:
        engine.close()


def test_vllm_is_told_and_nothing_else_changes():
    said: list[dict] = []

    class Model:
        def chat(self, messages: list, sampling: list, **more: object) -> list:
            said.append({"asked": len(messages), **more})
            raise StopIteration

    class Library:
        SamplingParams = dict

    for thinking in ("auto", "on", "off"):
        with pytest.raises(StopIteration):
            answer(Library, Model(), [Request("x", messages=ASK, thinking=thinking).to_dict()])
    kwargs = [{}] + [{"chat_template_kwargs": {"enable_thinking": on}} for on in (True, False)]
    assert said == [{"asked": 1, **each} for each in kwargs]


def test_endpoints_are_told(tiny_model: Path):
    with ScriptedEndpoint(lambda body: "b") as endpoint:
        engine = open_engine(EngineConfig(kind="openai", url=endpoint.url, concurrency=1), tiny_model)
        list(engine.generate([Request("1", messages=ASK), Request("2", messages=ASK, thinking="off")]))
    bodies = [body.get("chat_template_kwargs") for _, body in endpoint.calls]
    assert sorted(bodies, key=str) == sorted([None, {"enable_thinking": False}], key=str)


def test_answers_kept_before_the_switch_was_there_are_found():
    assert "thinking" not in Request("x").to_dict()
    assert Request("x", thinking="off").to_dict()["thinking"] == "off"


def test_an_answer_does_not_end_inside_a_thought():
    request = Request("x", messages=ASK, ends_as="explained", thinking="on")
    thought = "<think>\n答え: a\nいや、違う。\n"
    assert finish(thought, request, "length") == (thought, "length")
    whole = thought + "</think>\n\n考察。\n答え: b\n次は"
    assert finish(whole, request, "length") == (whole.removesuffix("\n次は"), "stop")


def test_the_switch_needs_a_chat_template():
    assert PromptConfig(chat=True, thinking="off").thinking == "off"
    with pytest.raises(ValueError, match="thinking=off is a chat template's switch: set chat=true"):
        PromptConfig(thinking="off")
    with pytest.raises(ValueError, match="'auto', 'on' or 'off'"):
        PromptConfig(chat=True, thinking="yes")


@pytest.mark.parametrize(("word", "read"), [("auto", "auto"), ("on", "on"), ("off", "off"), ("'off'", "off")])
def test_a_recipe_may_say_on_and_off_without_quotes(tmp_path: Path, word: str, read: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: r\nmodel: {{size: mini}}\nlayout: {{overlap_grad_reduce: {word}}}\n"
        f"eval: {{exam: {{data: [x]}}, prompt: {{chat: true, thinking: {word}}}}}\n"
    )
    run = load(recipe, [])
    assert run.eval is not None and run.eval.prompt.thinking == read == run.layout.overlap_grad_reduce
