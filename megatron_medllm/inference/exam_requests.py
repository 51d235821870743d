"""Requests for exam questions: the same prompt whether a question is examined or sampled for training pairs."""

from collections.abc import Sequence
from pathlib import Path

from megatron_medllm.config.exam import DecodingConfig, PromptConfig
from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_shots
from megatron_medllm.exams.prompts import Mode, PromptSet, load_prompt_set, render_messages, render_text
from megatron_medllm.exams.question import Question
from megatron_medllm.inference.protocol import Request, request_seed

# Looked for beside the questions and one folder up; the second is where a clone of IgakuQA has them.
SHOT_FILES = ("fewshot_prompt.jsonl", "scripts/prompts/prompt.jsonl")


class ExamPrompter:
    """Turns questions into requests under one prompt configuration."""

    def __init__(self, config: PromptConfig, data: Sequence[Path]) -> None:
        """`data`: the exam's places, searched for the default few-shot file.

        Raises:
            UserError: no such prompt set, or not enough worked examples.
        """
        self._config = config
        self.prompts: PromptSet = load_prompt_set(config.template)
        self.shots: tuple[Question, ...] = ()
        if config.shots:
            path = config.shot_file or find_shot_file(data)
            shots = load_shots(path)
            if len(shots) < config.shots:
                raise UserError(f"{path}: holds {len(shots)} worked examples, prompt.shots asks for {config.shots}")
            self.shots = shots[: config.shots]

    def prompt(self, question: Question, mode: Mode, *, with_shots: bool = True) -> str | list[dict[str, str]]:
        """What the model is asked: a text, or messages for its chat template."""
        render = render_messages if self._config.chat else render_text
        return render(
            self.prompts,
            question,
            mode,
            shots=self.shots if with_shots else (),
            explain_shots=self._config.explain_shots,
            reveal_count=self._config.reveal_count,
        )

    def request(
        self,
        question: Question,
        mode: Mode,
        decoding: DecodingConfig,
        *,
        sample: int = 0,
        temperature: float | None = None,
    ) -> Request:
        """The request for one answer; `sample` numbers repeated answers, each with its own seed."""
        temperature = decoding.temperature if temperature is None else temperature
        request_id = f"{question.problem_id}/{mode}/{temperature:g}/{sample}"
        asked = self.prompt(question, mode)
        return Request(
            request_id=request_id,
            prompt=asked if isinstance(asked, str) else "",
            messages=() if isinstance(asked, str) else tuple(asked),
            max_new_tokens=getattr(decoding.max_new_tokens, mode),
            temperature=temperature,
            top_p=decoding.top_p,
            seed=request_seed(decoding.seed, request_id),
            stop=decoding.stop,
            thinking=self._config.thinking,
            # A chat model ends its turn itself, and may lead up to a short answer with a line of its own.
            ends_as=None if self._config.chat and mode == "answer_only" else mode,
        )


def find_shot_file(data: Sequence[Path]) -> Path:
    """The worked examples that lie beside an exam's questions, or one folder up.

    Raises:
        UserError: there are none.
    """
    for place in data:
        for directory in (place, *place.parents[:1]):
            for name in SHOT_FILES:
                if (directory / name).is_file():
                    return directory / name
    raise UserError(
        f"prompt.shots needs worked examples: set prompt.shot_file, or put {SHOT_FILES[0]} beside the questions"
    )
