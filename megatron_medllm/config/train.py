"""How a stage trains: data, batches, optimizer, adapters, checkpoints, guards."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_medllm.config.base import Section, Switch
from megatron_medllm.config.cluster import Seconds

# Scales per block of 128 (the torch backend's own and Transformer Engine's), of earlier steps, or of the whole tensor.
Fp8Recipe = Literal["blockwise", "delayed", "tensorwise"]


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="final learning rate / peak")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm up linearly")
    decay_ratio: float = Field(default=0.2, gt=0, le=1, description="share of the steps that decay (wsd)")
    weight_decay: float = Field(default=0.1, ge=0, description="not applied to norms and biases")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0, description="global gradient norm; 0 turns clipping off")
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of Adam's moments; bfloat16: 4 bytes a weight less, rounded stochastically"
    )


class AdapterConfig(Section):
    """LoRA (arXiv 2106.09685) on a frozen base; `base` is how the frozen weights are held."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    base: Literal["bf16", "fp8", "nf4"] = "bf16"
    path: Path | None = Field(
        default=None, description="start from this PEFT adapter; its rank, alpha and targets replace those here"
    )


class CheckpointConfig(Section):
    """When training state is written and which checkpoints are kept."""

    every_steps: int = Field(default=0, ge=0, description="0: only at the end and on a signal")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    keep_every_steps: int = Field(default=0, ge=0, description="checkpoints at multiples of this stay for good")
    async_save: bool = Field(default=False, description="write in the background while training goes on")
    best: str | None = Field(
        default=None, description="keep the checkpoint that is best by this metric on held-out data: validation_loss, …"
    )
    export: Literal["best", "last"] | None = Field(
        default=None, description="which checkpoint becomes the stage's model; default: best where `best` is set"
    )

    @model_validator(mode="after")
    def _best_by_something(self) -> "CheckpointConfig":
        if self.export == "best" and self.best is None:
            raise ValueError("export=best needs a metric: set checkpoint.best")
        return self

    @property
    def exports_best(self) -> bool:
        """Whether the stage's model is the best checkpoint's."""
        return self.best is not None and self.export != "last"


class GuardConfig(Section):
    """What training does when a step's numbers are not to be trusted, and when time runs out."""

    loss_spike_factor: float = Field(
        default=0.0, ge=0, description="skip a step whose loss exceeds this x the median; 0: off"
    )
    window: int = Field(default=50, gt=1, description="steps of the median")
    roll_back_after: int = Field(
        default=5, ge=1, description="skipped steps in a row before the last checkpoint is reloaded"
    )
    stop_after: int = Field(default=20, ge=1, description="skipped steps in all before the run stops")
    patience: int = Field(
        default=0, ge=0, description="stop after so many validations without a better checkpoint.best; 0: never"
    )
    walltime_s: Annotated[Seconds, Field(gt=0)] | None = Field(
        default=None, description="stop in time for this, in seconds or as 12:00:00; default: MEDLLM_WALLTIME_S or none"
    )


class WatchConfig(Section):
    """Ranks that stop answering, and ranks that are slower than the others."""

    stall_timeout_s: float = Field(
        default=300.0,
        ge=0,
        description="a rank silent, or no micro-batch begun on any rank, for so long ends the run; 0: off",
    )
    slow_factor: float = Field(
        default=1.5, gt=1, description="slow: a rank whose own time of a step is above this x the median of the others"
    )
    slow_steps: int = Field(default=20, gt=0, description="steps over which a rank must be slow to be named")


class TrainConfig(Section):
    """What CPT and RPO share."""

    optimizer: OptimizerConfig
    sequence_length: int = Field(gt=0, description="tokens of one packed row")
    micro_batch_size: int = Field(default=1, gt=0, description="rows in one forward pass")
    global_batch_size: int = Field(gt=0, description="rows (CPT) or pairs (RPO) in one step, over all replicas")
    adapter: AdapterConfig | None = Field(default=None, description="LoRA; none: all parameters train")
    fp8: Literal["none", "hybrid"] = Field(
        default="none", description="FP8 GEMMs in full training (Transformer Engine; e4m3, gradients e5m2)"
    )
    fp8_recipe: Fp8Recipe = Field(default="blockwise", description="how FP8 is scaled; torch backend: blockwise")
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watch: WatchConfig = WatchConfig()
    log_every_steps: int = Field(default=1, gt=0)
    validate_every_steps: int = Field(default=0, ge=0, description="0: only at the end, where validation data exist")
    validate_at_start: bool = Field(default=True, description="validate before step 1 too, where validation data exist")
    validation_batches: int = Field(default=8, gt=0, description="of every source's held-out share, at most")
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _one_fp8(self) -> "TrainConfig":
        if self.fp8 != "none" and self.adapter is not None:
            raise ValueError("fp8=hybrid is for full training; for LoRA on FP8 weights set adapter.base=fp8")
        return self

    @model_validator(mode="after")
    def _best_of_several(self) -> "TrainConfig":
        if self.checkpoint.best is not None and not self.validate_every_steps:
            raise ValueError("checkpoint.best chooses among validations: set validate_every_steps")
        if self.guard.patience and self.checkpoint.best is None:
            raise ValueError("guard.patience needs to know what is better: set checkpoint.best")
        return self

    @property
    def stream_length(self) -> int:
        """Tokens of a micro-batch: its rows lie behind one another in one stream."""
        return self.micro_batch_size * self.sequence_length

    @property
    def fp8_gemms(self) -> Fp8Recipe | None:
        """The recipe of full training in FP8, None without."""
        return None if self.fp8 == "none" else self.fp8_recipe


class DataSource(Section):
    """One corpus in the blend."""

    path: Path = Field(description="folder that `medllm corpus build` wrote")
    weight: float = Field(default=1.0, gt=0, description="its share among the corpora of the blend")


class CptConfig(TrainConfig):
    """Continued pretraining on a blend of indexed datasets."""

    data: tuple[DataSource, ...] = Field(min_length=1)
    train_tokens: int | None = Field(default=None, gt=0, description="token budget; give this or epochs")
    epochs: float | None = Field(
        default=None, gt=0, description="tokens to train on, in passes over the corpora; or train_tokens"
    )
    loss_after: tuple[str, ...] = Field(
        default=(), description="in documents that contain one of these strings, only what follows it is learned"
    )
    z_loss: float = Field(default=0.0, ge=0, description="coefficient of log(Z)^2 (PaLM, section 5)")
    batch_ramp_steps: int = Field(default=0, ge=0, description="steps over which the batch grows to global_batch_size")

    @field_validator("loss_after")
    @classmethod
    def _markers_are_texts(cls, markers: tuple[str, ...]) -> tuple[str, ...]:
        if "" in markers:
            raise ValueError("an empty text marks nothing")
        return markers

    @model_validator(mode="after")
    def _one_budget(self) -> "CptConfig":
        if (self.train_tokens is None) == (self.epochs is None):
            raise ValueError("give exactly one of train_tokens and epochs")
        return self


class RpoLossConfig(Section):
    """Reasoning Preference Optimization (arXiv 2404.19733) and its relatives."""

    kind: Literal["rpo", "dpo_norm", "cdpo", "hinge", "ipo", "dpop", "simpo", "sft"] = "rpo"
    beta: float = Field(default=0.1, gt=0)
    alpha: float = Field(default=1.0, ge=0, description="weight of the length-normalised NLL of the chosen response")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="cdpo: probability that a label is flipped")
    dpop_lambda: float = Field(default=50.0, ge=0, description="dpop: weight of its penalty")
    simpo_gamma: float = Field(default=0.5, ge=0, description="simpo: target margin")

    @model_validator(mode="after")
    def _fits(self) -> "RpoLossConfig":
        if (self.label_smoothing > 0) != (self.kind == "cdpo"):
            raise ValueError("label_smoothing goes with kind=cdpo, and cdpo needs it > 0")
        if self.kind == "sft" and self.alpha == 0:
            raise ValueError("kind=sft is the NLL alone: alpha must be > 0")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference's log-probabilities."""
        return self.kind not in ("simpo", "sft")


class RpoGuardConfig(GuardConfig):
    """Signs of a preference run going wrong, beside those of any training."""

    chosen_fall_steps: int = Field(
        default=20, gt=0, description="warn when the chosen log-prob fell for this many steps"
    )
    max_margin: float = Field(default=1e4, gt=0, description="stop when the mean margin exceeds this")
    max_grad_norm: float = Field(default=1e6, gt=0, description="stop when the gradient norm exceeds this")


class RpoFilterConfig(Section):
    """Which pairs are left out before training."""

    min_edit_distance: float = Field(default=0.0, ge=0, le=1, description="drop pairs whose answers differ by less")


class RpoConfig(TrainConfig):
    """Preference optimization on pairs, against cached reference log-probabilities."""

    pairs: Path = Field(description="JSONL or Parquet with prompt, chosen, rejected")
    reference: Path | None = Field(default=None, description="folder of `medllm score`; default: OUTPUT/../reference")
    epochs: float = Field(default=1.0, gt=0)
    loss: RpoLossConfig = RpoLossConfig()
    share_prompt: bool = Field(default=True, description="chosen and rejected behind one copy of their prompt")
    template: str = Field(default="plain", description="plain: prompt + response; chat: the tokenizer's chat template")
    thinking: Switch = Field(
        default="auto", description="chat: the template's switch for thinking (Qwen3); auto: the template's default"
    )
    add_eos: bool = Field(default=True, description="responses end with the tokenizer's eos")
    mask_patterns: tuple[str, ...] = Field(default=(), description="regexes of response text left out of the DPO term")
    too_long: Literal["drop", "cut_prompt"] = "drop"
    filters: RpoFilterConfig = RpoFilterConfig()
    validation_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of the questions whose pairs validate and never train; 0: none"
    )
    guard: RpoGuardConfig = RpoGuardConfig()
