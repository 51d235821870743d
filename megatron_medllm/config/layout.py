"""How a model is spread over processes, and the checks that a layout fits a model and a world."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_medllm.config.base import Section, Switch
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError


class LayoutConfig(Section):
    """Parallel sizes; data parallelism takes the rest of the world (`nodes` x `gpus_per_node`)."""

    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int | None = Field(default=None, gt=0, description="processes per node; default: just enough for dp")
    dp: int | None = Field(default=None, gt=0, description="data-parallel size; default: world / (tp*pp*cp)")
    tp: int = Field(default=1, gt=0, description="tensor parallel")
    pp: int = Field(default=1, gt=0, description="pipeline parallel")
    vpp: int = Field(default=1, gt=0, description="model chunks per pipeline stage (interleaved schedule when > 1)")
    cp: int = Field(default=1, gt=0, description="context parallel: ranks that share every stream of tokens")
    sp: bool = Field(default=False, description="sequence parallelism inside the tensor-parallel group")
    distributed_optimizer: bool = True
    overlap_grad_reduce: Switch = Field(
        default="auto",
        description="reduce gradients over data-parallel ranks while the backward pass goes on; auto: on CUDA with "
        "dp x cp > 1",
    )
    overlap_param_gather: Switch = Field(
        default="auto",
        description="gather updated weights during the next forward pass; auto: where gradients overlap, with the "
        "distributed optimizer",
    )
    bucket_size: int | None = Field(
        default=None,
        gt=0,
        description="numbers in one overlapped exchange, at least; default: the larger of 40M and 1M x dp x cp",
    )
    recompute: Literal["none", "swiglu", "selective", "full"] = Field(
        default="none",
        description="what the backward pass computes again: SwiGLU's result (torch backend; a fifth of what LoRA "
        "keeps, at the price of one element-wise pass), core attention, or whole layers",
    )
    first_stage_layers: int | None = Field(
        default=None, gt=0, description="layers on the first pipeline stage, if uneven"
    )
    last_stage_layers: int | None = Field(
        default=None, gt=0, description="layers on the last pipeline stage, if uneven"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "LayoutConfig":
        if self.sp and self.tp == 1:
            raise ValueError("sp=true needs tp > 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError("vpp > 1 needs pp > 1")
        if self.vpp > 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ValueError("uneven stages cannot be combined with vpp > 1")
        if self.overlap_param_gather == "on":
            if not self.distributed_optimizer:
                raise ValueError("overlap_param_gather=on needs distributed_optimizer=true: nothing is gathered else")
            if self.overlap_grad_reduce == "off":
                raise ValueError("overlap_param_gather=on needs overlap_grad_reduce on or auto")
        per_replica = self.tp * self.pp * self.cp
        if self.gpus_per_node is not None:
            world = self.nodes * self.gpus_per_node
            if world % per_replica:
                raise ValueError(f"world of {world} processes is not a multiple of tp*pp*cp = {per_replica}")
            if self.dp is not None and self.dp * per_replica != world:
                raise ValueError(f"dp*tp*pp*cp = {self.dp * per_replica}, but the world has {world} processes")
        elif ((self.dp or 1) * per_replica) % self.nodes:
            raise ValueError(
                f"{(self.dp or 1) * per_replica} processes cannot be spread evenly over {self.nodes} nodes"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes in the whole run."""
        if self.gpus_per_node is not None:
            return self.nodes * self.gpus_per_node
        return (self.dp or 1) * self.tp * self.pp * self.cp

    @property
    def data_parallel_size(self) -> int:
        """Model replicas."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def stream_multiple(self) -> int:
        """What the tokens of a micro-batch must be a multiple of: two chunks a context rank, even slices within."""
        chunks = 2 * self.cp if self.cp > 1 else 1
        return chunks * (self.tp if self.sp else 1)

    def check_stream(self, length: int) -> None:
        """Refuse micro-batches of `length` tokens that cannot be shared out evenly.

        Raises:
            UserError: names the parallel sizes and the length.
        """
        if length % self.stream_multiple:
            parts = ([f"2 x cp = {2 * self.cp}"] if self.cp > 1 else []) + ([f"tp = {self.tp}"] if self.sp else [])
            raise UserError(
                f"micro_batch_size x sequence_length = {length} tokens are not a multiple of "
                f"{' x '.join(parts)}, over which layout splits them"
            )

    @property
    def vocab_multiple(self) -> int:
        """What the embedding's rows are padded to: Megatron's 128 x tp."""
        return 128 * self.tp

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a layout that does not divide the model.

        Raises:
            UserError: names the field and the number that does not divide.
        """
        for name, size in (
            ("num_attention_heads", shape.num_attention_heads),
            ("ffn_hidden_size", shape.ffn_hidden_size),
        ):
            if size % self.tp:
                raise UserError(f"layout.tp={self.tp} does not divide the model's {name} = {size}")
        if shape.num_query_groups % self.tp and self.tp % shape.num_query_groups:
            raise UserError(f"layout.tp={self.tp} does not fit the model's num_query_groups = {shape.num_query_groups}")
        fixed = [n for n in (self.first_stage_layers, self.last_stage_layers) if n is not None]
        stages = self.pp * self.vpp - len(fixed)
        rest = shape.num_layers - sum(fixed)
        if (stages == 0 and rest) or rest < stages or (stages and rest % stages):
            raise UserError(
                f"layout.pp={self.pp} x vpp={self.vpp} does not divide the model's {shape.num_layers} layers; "
                "set layout.first_stage_layers / layout.last_stage_layers"
            )


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the padded embedding: `vocab_size` rounded up to `multiple`."""
    return -(-vocab_size // multiple) * multiple
