"""The miniature world's size and manners: how much text there is, and how careless its writers are."""

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section


class DemoConfig(Section):
    """What `medllm demo` invents. The same values always give the same files, byte for byte."""

    seed: int = Field(default=0, ge=0, description="seed of every name, fact, document and question")
    diseases: int = Field(
        default=24, ge=8, description="invented diseases; even, because they come in look-alike pairs"
    )
    known_diseases: int = Field(default=12, ge=0, description="of these, how many the base corpus already describes")
    towns: int = Field(default=12, ge=8, description="invented towns: the general domain that teaches the exam's form")
    base_documents: int = Field(default=40000, gt=0, description="documents in base.jsonl")
    medical_documents: int = Field(default=36000, gt=0, description="documents in medical.jsonl")
    rehearsal_share: float = Field(default=0.1, ge=0, le=1, description="share of town documents in medical.jsonl")
    question_share: float = Field(
        default=0.5, ge=0, le=1, description="share of documents that are a question and its key"
    )
    explained_share: float = Field(
        default=0.4, ge=0, le=1, description="share that are a question, an explanation, a key"
    )
    careless_share: float = Field(default=0.6, ge=0, le=1, description="share of explanations by careless writers")
    confused_share: float = Field(
        default=0.4, ge=0, le=1, description="share of facts that careless writers mix up with the look-alike's"
    )
    two_answer_share: float = Field(
        default=0.3, ge=0, le=1, description="share of 'choose two' where a fact has two values"
    )
    exam_questions: int = Field(default=240, gt=0, description="held-out questions")
    development_questions: int = Field(
        default=120, gt=0, description="questions for choosing settings and early stopping"
    )
    train_questions: int = Field(
        default=320, gt=0, description="questions with gold explanations, for preference pairs"
    )
    unseen_share: float = Field(
        default=0.4, ge=0, lt=1, description="share of diseases that no training question is about"
    )
    vocab_size: int = Field(default=1024, ge=600, description="rows of the byte-level BPE vocabulary, at most")

    @model_validator(mode="after")
    def _consistent(self) -> "DemoConfig":
        if self.diseases % 2 or self.towns % 2:
            raise ValueError("diseases and towns come in look-alike pairs: both numbers must be even")
        if self.known_diseases > self.diseases:
            raise ValueError(f"known_diseases={self.known_diseases} is more than diseases={self.diseases}")
        if self.question_share + self.explained_share > 1:
            raise ValueError("question_share + explained_share is more than 1")
        return self
