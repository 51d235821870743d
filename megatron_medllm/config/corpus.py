"""What the corpus builder reads, which steps it applies, and how the result is to be blended."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_medllm.config.base import Section

Paths = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str | Path) else value)]


class CleanConfig(Section):
    """Steps on the text of one source. All but NFC are off: rules made for the web destroy medical text."""

    nfc: bool = Field(default=True, description="Unicode NFC; leaves ①, 10⁶ and ㎎ alone (NFKC would not)")
    strip_zero_width: bool = Field(default=False, description="remove zero-width and direction marks, soft hyphens")
    strip_control: bool = Field(default=False, description="remove control characters other than tab and newline")
    fold_width: Literal["none", "alphanumeric", "ascii"] = Field(
        default="none", description="full-width to ASCII: letters and digits, or all of ！ to ～"
    )
    fold_halfwidth_kana: bool = Field(default=False, description="ｶﾞ to ガ, ｡ to 。")
    dedup_lines: bool = Field(default=False, description="keep the first of equal lines within a document")
    min_chars: int = Field(default=0, ge=0, description="drop shorter documents (0: keep all)")
    max_chars: int = Field(default=0, ge=0, description="drop longer documents (0: keep all)")
    min_japanese_ratio: float = Field(
        default=0.0, ge=0, le=1, description="drop documents with a smaller share of kana, kanji and 、。 (0: keep all)"
    )
    max_repeat_ratio: float = Field(
        default=1.0, ge=0, le=1, description="drop documents where more 10-grams recur (1: keep all)"
    )

    @property
    def judges(self) -> bool:
        """Whether a document that is not empty may be dropped."""
        return bool(self.min_chars or self.max_chars or self.min_japanese_ratio or self.max_repeat_ratio < 1)


class SourceConfig(Section):
    """One body of text: files, or a Hugging Face data set. It becomes one `.bin`/`.idx` pair."""

    paths: Paths = Field(default=[], description="files or globs (** recurses); read in sorted order")
    dataset: str | None = Field(default=None, description="Hugging Face data set, hub name or local directory")
    dataset_config: str | None = Field(default=None, description="the data set's configuration name")
    dataset_split: str = Field(default="train", description="the data set's split")
    format: Literal["auto", "jsonl", "parquet", "lines", "text"] = Field(
        default="auto",
        description="auto: by file name (JSON arrays are told by their beginning); lines: a document per line; text: a "
        "document per file; .gz, .zst, .bz2 and .xz are opened",
    )
    encoding: str = Field(
        default="utf-8",
        description="of files without a byte order mark and of Parquet's binary columns: cp932, euc-jp, utf-16, …",
    )
    text_field: str = Field(default="text", description="`doc.text`: the field `text` within `doc`")
    id_field: str = Field(default="id", description="names a document in `dropped`; file:line where it has none")
    max_document_mb: float = Field(
        default=256, gt=0, description="longer lines, array elements and texts are dropped, not held in memory"
    )
    zstd_window_mb: int = Field(
        default=2048,
        gt=0,
        le=2048,
        description="largest zstd window (or xz dictionary) to allocate, the memory that a worker may need; "
        "2,048 is what `zstd --long=31` asks for",
    )
    weight: float | None = Field(default=None, gt=0, description="share in the blend; default: by its tokens")
    replay: bool = Field(default=False, description="general text, whose blend share is `replay_share`")
    priority: int = Field(default=0, description="of copies, `keep` prefers the higher")
    licence: str = Field(default="", description="of the text, for the manifest and the model card")
    clean: CleanConfig = CleanConfig()

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        try:
            "".encode(name)
        except (LookupError, UnicodeError):
            raise ValueError(
                "no such text encoding (utf-8, cp932, shift_jis, euc-jp, iso-2022-jp, utf-16, …)"
            ) from None
        return name

    @property
    def max_document_bytes(self) -> int:
        """`max_document_mb` in bytes."""
        return int(self.max_document_mb * 1e6)

    @property
    def window_bytes(self) -> int:
        """`zstd_window_mb` in bytes."""
        return self.zstd_window_mb << 20

    @model_validator(mode="after")
    def _one_input(self) -> "SourceConfig":
        if bool(self.paths) == bool(self.dataset):
            raise ValueError("give exactly one of `paths` and `dataset`")
        return self


class DedupConfig(Section):
    """Copies within and across sources.

    Near copies: MinHash over character 5-grams, `bands` x `rows` hashes. A pair of Jaccard similarity J becomes a
    candidate with probability 1 - (1 - J^rows)^bands (0.998 at J = 0.8 by default, 0.27 at 0.5). Candidates whose
    estimated similarity lies more than `slack` below `threshold` are let go.
    """

    exact: bool = Field(default=False, description="drop documents whose cleaned text is equal")
    near: bool = Field(default=False, description="drop near copies (includes exact)")
    threshold: float = Field(default=0.8, gt=0, lt=1, description="Jaccard similarity of near copies")
    slack: float = Field(default=0.1, ge=0, lt=1, description="about 2.5 standard errors of the estimate")
    bands: int = Field(default=20, gt=0)
    rows: int = Field(default=6, gt=0)
    keep: Literal["longest", "priority", "first"] = Field(
        default="longest", description="which of a cluster stays; ties: priority or length, then the first"
    )
    seed: int = 42


class DecontaminateConfig(Section):
    """Exam questions that must not be trained on."""

    exams: Paths = Field(default=[], description="JSONL files, globs or directories of questions; none: step is off")
    action: Literal["drop", "mask"] = Field(default="drop", description="drop the document, or cut the passages out")
    match_chars: int = Field(default=30, ge=13, description="folded characters in a row that count as a match")
    coverage: float = Field(default=0.5, gt=0, le=1, description="share of a question's 13-grams that counts as one")
    boilerplate_editions: int = Field(
        default=2, ge=2, description="grams found in this many exam editions are boilerplate and never count"
    )


class CorpusConfig(Section):
    """Text to Megatron's indexed data sets."""

    sources: dict[str, SourceConfig] = Field(min_length=1, description="name (also the prefix's) to source")
    tokenizer: str = Field(description="HF directory, tokenizer.json, hub name, SentencePiece model or tiktoken ranks")
    tokenizer_kind: Literal["auto", "huggingface", "sentencepiece", "tiktoken"] = "auto"
    tiktoken_pattern: str | None = Field(default=None, description="splitting regex; required with tiktoken ranks")
    eod_id: int = Field(
        ge=0, description="token that ends a document. Qwen2.5 base models: 151643 (not the Instruct config's 151645)"
    )
    dedup: DedupConfig = DedupConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    keep_empty: bool = Field(
        default=True,
        description="an empty input text leaves an empty index entry, as Megatron's preprocess_data.py does",
    )
    split: tuple[float, float, float] = Field(default=(0.98, 0.02, 0.0), description="training, validation, test")
    replay_share: float | None = Field(
        default=None, ge=0, lt=1, description="blend share of the sources marked `replay`; default: by their weights"
    )
    token_budget: int | None = Field(default=None, gt=0, description="tokens to train on: gives epochs per source")
    chunk_mb: float = Field(default=64, gt=0, description="input per unit of work, the most a killed run repeats")

    @model_validator(mode="after")
    def _consistent(self) -> "CorpusConfig":
        for name in self.sources:
            if not name or name.startswith(".") or "/" in name:
                raise ValueError(f"source name {name!r} cannot be a file name")
        if sum(self.split) <= 0 or min(self.split) < 0:
            raise ValueError(f"split {self.split} must be shares with a positive sum")
        replays = [source.replay for source in self.sources.values()]
        if self.replay_share is not None and (not any(replays) or all(replays)):
            raise ValueError("replay_share needs at least one source marked `replay` and one that is not")
        weights = [source.weight is not None for source in self.sources.values()]
        if any(weights) and not all(weights):
            raise ValueError("give every source a weight, or none")
        return self
