"""The two prompts, answer only and explained, rendered from template files that a user can replace.

A prompt set is a directory with four Jinja files, `{answer_only,explained}.{prompt,response}.jinja`, and optionally
`system.txt` (used with a chat template). Templates see `problem_text`, `choices` (pairs of label and text), `labels`,
`kind`, `count` (how many answers to choose, or None when it is not to be revealed); responses see `answer` and
`explanation`. One final newline of a file is not part of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, TemplateError

from megatron_medllm.errors import UserError
from megatron_medllm.exams.question import Question

Mode = Literal["answer_only", "explained"]
MODES: tuple[Mode, ...] = ("answer_only", "explained")
SETS_DIR = Path(__file__).parent / "prompts"
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptSet:
    """The templates of one directory."""

    directory: Path

    @cached_property
    def system(self) -> str:
        """The system message, empty when there is none."""
        path = self.directory / "system.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    @cached_property
    def _templates(self) -> dict[str, Template]:
        environment = Environment(loader=FileSystemLoader(self.directory), undefined=StrictUndefined, autoescape=False)
        names = [f"{mode}.{part}.jinja" for mode in MODES for part in ("prompt", "response")]
        for name in names:
            if not (self.directory / name).is_file():
                raise UserError(f"{self.directory}: a prompt set needs {', '.join(names)}; {name} is missing")
        try:
            return {name: environment.get_template(name) for name in names}
        except TemplateError as error:
            raise UserError(f"{self.directory}: {error}") from None

    def prompt(self, question: Question, mode: Mode, *, reveal_count: bool = True) -> str:
        """The text that asks `question`, ending where the model goes on.

        Raises:
            UserError: the template uses an unknown variable.
        """
        return self._render(
            f"{mode}.prompt.jinja",
            problem_text=question.problem_text,
            choices=list(zip(question.labels, question.choices, strict=False)),
            labels=list(question.labels),
            kind=question.kind,
            count=question.n_answers if reveal_count else None,
        )

    def response(self, mode: Mode, *, answer: Sequence[str], explanation: str = "") -> str:
        """What a model should write after `prompt`.

        Raises:
            UserError: the template uses an unknown variable.
        """
        return self._render(f"{mode}.response.jinja", answer=",".join(answer), explanation=explanation)

    def _render(self, name: str, **variables: object) -> str:
        try:
            return self._templates[name].render(**variables)
        except TemplateError as error:
            raise UserError(f"{self.directory / name}: {error}") from None


def load_prompt_set(name_or_path: str | Path) -> PromptSet:
    """A shipped set by name (`igakuqa`, `compact`), or a directory.

    Raises:
        UserError: neither exists.
    """
    shipped = SETS_DIR / str(name_or_path)
    directory = shipped if shipped.is_dir() else Path(name_or_path)
    if not directory.is_dir():
        known = ", ".join(sorted(p.name for p in SETS_DIR.iterdir() if p.is_dir()))
        raise UserError(f"prompt set {str(name_or_path)!r}: not a directory and not one of {known}")
    return PromptSet(directory)


def render_text(
    prompts: PromptSet,
    question: Question,
    mode: Mode,
    *,
    shots: Sequence[Question] = (),
    explain_shots: bool = True,
    reveal_count: bool = True,
) -> str:
    """The whole prompt of a base model: worked examples, then the question."""
    parts = [
        prompts.prompt(shot, shot_mode, reveal_count=reveal_count)
        + prompts.response(shot_mode, answer=shot.accepted[0], explanation=shot.explanation)
        for shot, shot_mode in _shots_with_mode(shots, mode, explain_shots)
    ]
    return SHOT_SEPARATOR.join([*parts, prompts.prompt(question, mode, reveal_count=reveal_count)])


def render_messages(
    prompts: PromptSet,
    question: Question,
    mode: Mode,
    *,
    shots: Sequence[Question] = (),
    explain_shots: bool = True,
    reveal_count: bool = True,
) -> list[dict[str, str]]:
    """The same as chat messages, for models with a chat template."""
    messages = [{"role": "system", "content": prompts.system}] if prompts.system else []
    for shot, shot_mode in _shots_with_mode(shots, mode, explain_shots):
        asked = prompts.prompt(shot, shot_mode, reveal_count=reveal_count)
        told = prompts.response(shot_mode, answer=shot.accepted[0], explanation=shot.explanation)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return [*messages, {"role": "user", "content": prompts.prompt(question, mode, reveal_count=reveal_count)}]


def _shots_with_mode(shots: Sequence[Question], mode: Mode, explain_shots: bool) -> list[tuple[Question, Mode]]:
    if mode == "explained" and explain_shots:
        for shot in shots:
            if not shot.explanation:
                raise UserError(f"few-shot item {shot.problem_id}: has no explanation; set explain_shots to false")
        return [(shot, "explained") for shot in shots]
    return [(shot, "answer_only") for shot in shots]
