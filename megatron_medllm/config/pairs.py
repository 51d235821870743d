"""How preference pairs are built: which questions, how many samples, which answer beats which, what is dropped."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section
from megatron_medllm.config.exam import EngineConfig, ExamConfig, MaxNewTokens, PromptConfig


class SamplingConfig(Section):
    """What the model is asked to write."""

    samples: int = Field(default=4, ge=0, description="explanations per question and temperature; 0: gold only")
    temperatures: tuple[float, ...] = Field(default=(0.7, 1.0), min_length=1)
    answer_only_samples: int = Field(default=2, ge=0, description="short answers per question, at the last temperature")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    max_new_tokens: MaxNewTokens = MaxNewTokens()
    stop: tuple[str, ...] = ("\n問題:",)

    @model_validator(mode="after")
    def _warm(self) -> "SamplingConfig":
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError("temperatures: the same one twice")
        if any(t < 0 for t in self.temperatures):
            raise ValueError("temperatures must not be negative")
        if self.samples > 1 and 0 in self.temperatures:
            raise ValueError("temperature 0 would give the same sample again; leave it out or set samples=1")
        return self


class TierWeights(Section):
    """The weight of a pair by who beats whom; 0 builds none. Gold > sampled right > sampled wrong > malformed."""

    gold_over_right: float = Field(default=0.5, ge=0)
    gold_over_wrong: float = Field(default=1.0, ge=0)
    gold_over_malformed: float = Field(default=0.5, ge=0)
    right_over_wrong: float = Field(default=1.0, ge=0)
    right_over_malformed: float = Field(default=0.5, ge=0)
    wrong_over_malformed: float = Field(default=0.0, ge=0)
    answer_only: float = Field(default=1.0, ge=0, description="right short answer over a wrong one")


class FilterConfig(Section):
    """What is not worth learning from. Explanations only, except empty ones and duplicates."""

    max_length_ratio: float = Field(default=4.0, ge=1, description="longer over shorter, in characters")
    malformed_length: float = Field(
        default=1.0, gt=0, description="an explanation that reaches no answer is cut to this x the chosen one's length"
    )
    min_edit_distance: float = Field(
        default=0.05, ge=0, le=1, description="Levenshtein distance over the longer length"
    )
    min_japanese: float = Field(default=0.5, ge=0, le=1, description="kana and kanji among the letters of a text")
    min_gold_chars: int = Field(default=20, ge=0, description="shorter gold explanations are not used")
    consistent: bool = Field(
        default=True, description="a chosen explanation may not judge the options against its answer"
    )
    truncated: bool = Field(
        default=True,
        description="drop explanations that max_new_tokens cut off amid their answer line; "
        "what reached no answer is malformed and stays",
    )


class PairsConfig(Section):
    """Pairs for one checkpoint: sample, judge, pair, filter."""

    questions: ExamConfig = Field(description="training questions; never those of the evaluation exam")
    exam: ExamConfig | None = Field(default=None, description="the evaluation exam, to check contamination against")
    contamination: Literal["refuse", "drop", "allow"] = Field(
        default="refuse", description="what to do with training questions that the evaluation exam holds"
    )
    prompt: PromptConfig = PromptConfig()
    train_without_shots: bool = Field(default=True, description="leave the worked examples out of the pairs' prompts")
    letters: bool = Field(default=True, description="rename numbered choices (YakugakuQA) to letters, in comments too")
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    parser: Literal["lenient", "strict"] = "lenient"
    weights: TierWeights = TierWeights()
    synthetic_wrong: bool = Field(
        default=True, description="answer-only pairs: make up a wrong answer where none was sampled"
    )
    max_pairs: int = Field(default=4, gt=0, description="explained pairs per question")
    min_explained_share: float = Field(
        default=0.25, ge=0, le=1, description="stop when fewer of the questions have an explained pair; 0: never"
    )
    max_answer_only_pairs: int = Field(default=1, ge=0, description="answer-only pairs per question")
    filters: FilterConfig = FilterConfig()
    parquet: bool = Field(default=False, description="write pairs.parquet beside pairs.jsonl")

    @property
    def explains(self) -> bool:
        """Whether explained pairs are asked for."""
        weights = self.weights.model_dump(exclude={"answer_only"})
        return self.sampling.samples > 0 and any(weights.values())

    @model_validator(mode="after")
    def _exam_is_known(self) -> "PairsConfig":
        if self.exam is None and self.contamination != "allow":
            raise ValueError(
                "set `exam` to the evaluation exam, so that its questions are kept out of training, "
                "or contamination=allow to go without the check"
            )
        return self
