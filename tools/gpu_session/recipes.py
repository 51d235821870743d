"""The training rows of the session: which recipe of examples/, with which settings and switches."""

from dataclasses import dataclass, field, replace

# Every switch at auto, but that plans of attention are built at once: what a user gets after some minutes.
ON = {"attention": "cudnn"}
OFF = {"attention": "flash", "lora": "separate", "optimizer": "megatron", "copies": "blocking",
       "swiglu": "megatron"}  # fmt: skip
PAIRS = {"prompt_length": 300, "response_length": 300}
WHOLE = {"document_length": 65536}  # longer than any row: attention over all of it
TINY_SHAPE = (
    "{num_layers: 2, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 4, num_query_groups: 2, "
    "vocab_size: 512, max_position_embeddings: 32768, tie_embeddings: false}"
)


@dataclass(frozen=True)
class Row:
    """One measurement. `kind`: train (as `medllm bench throughput`) or rank (as `medllm bench rank`)."""

    recipe: str
    overrides: tuple[str, ...] = ()
    lengths: dict[str, int] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=lambda: ON)
    kind: str = "train"
    steps: int = 4
    warmup_steps: int = 12  # attention's plans for most kinds of streams are built in them
    rank: int = 0
    tiny: tuple[str, ...] = ()  # further overrides of a tiny run
    tiny_rank: int = 0

    def all_overrides(self, *, tiny: bool) -> list[str]:
        """What follows the recipe on the command line: no data and no weights are read."""
        found = ["data=/nowhere", "model.path=null", *self.overrides]
        found += [
            f"kernels.{name}={'auto' if tiny and value == 'cudnn' else value}"  # a tiny run may be on a CPU
            for name, value in self.switches.items()
        ]
        return [*tiny_overrides(found), *self.tiny] if tiny else found


def tiny_overrides(overrides: list[str]) -> list[str]:
    """The same at a size that a CPU computes in a moment: a tiny shape, rows a sixteenth as long."""
    found = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "model.size":
            found.append(f"model.shape={TINY_SHAPE}")
        else:
            found.append(f"{name}={int(value) // 16}" if name.endswith("sequence_length") else override)
    return found


def lora(rows: int, length: int, **settings: object) -> Row:
    """Continued pretraining of 7B with LoRA of rank 16."""
    overrides = (
        "model.size=7b",
        f"cpt.global_batch_size={rows}",
        "cpt.adapter.rank=16",
        f"cpt.sequence_length={length}",
    )
    return replace(Row("cpt-qwen2.5-7b-1n1g-lora", overrides), **settings)


def rpo(length: int, *more: str, **settings: object) -> Row:
    """RPO of 7B with LoRA of rank 16, 8 pairs a step."""
    overrides = (
        "model.size=7b", "rpo.global_batch_size=8", "rpo.adapter.rank=16", f"rpo.sequence_length={length}", *more
    )  # fmt: skip
    return replace(Row("rpo-qwen2.5-7b-1n1g-lora", overrides, lengths=PAIRS), **settings)


FP8_8K = replace(lora(2, 8192), recipe="cpt-qwen2.5-7b-1n1g-fp8lora")
# With every switch on, with every one off, with one off. What is compiled for one shape serves the rows beside it.
ROWS: dict[str, Row] = {
    "lora-8k-whole": lora(1, 8192, lengths=WHOLE, warmup_steps=3),
    "lora-8k-whole all off": lora(1, 8192, lengths=WHOLE, warmup_steps=3, switches=OFF),
    "lora-4k": lora(4, 4096),
    "lora-4k all off": lora(4, 4096, switches=OFF),
    "fp8-8k": FP8_8K,
    "fp8-8k all off": replace(FP8_8K, switches=OFF),
    "rpo-8k": rpo(8192),
    "rpo-8k all off": rpo(8192, switches=OFF),
    "rpo-2k": rpo(2048),
    "rpo-2k-fp8": rpo(2048, "rpo.adapter.base=fp8"),
    "rpo-2k swiglu": rpo(2048, "layout.recompute=swiglu"),
    "lora-4k attention=flash": lora(4, 4096, switches={"attention": "flash"}),
    "lora-4k lora=separate": lora(4, 4096, switches=ON | {"lora": "separate"}),
    "lora-4k optimizer=megatron": lora(4, 4096, switches=ON | {"optimizer": "megatron"}),
    "lora-4k copies=blocking": lora(4, 4096, switches=ON | {"copies": "blocking"}),
    "lora-4k swiglu=megatron": lora(4, 4096, switches=ON | {"swiglu": "megatron"}),
    "rpo-4k": rpo(4096),
    "lora-8k": lora(2, 8192),
}
TRAIN = list(ROWS)
ROWS["full-7b"] = Row(
    "cpt-qwen2.5-7b-1n1g-lora",
    (
        "model.size=7b",
        "cpt.adapter=null",
        "cpt.global_batch_size=1",
        "layout.recompute=full",
        "cpt.optimizer.moments_dtype=bfloat16",
    ),
    steps=3,
    warmup_steps=1,
)
ROWS["lora-72b-fp8"] = Row(
    "cpt-qwen2.5-7b-1n1g-fp8lora",
    ("model.size=72b", "cpt.global_batch_size=1", "cpt.adapter.rank=16", "cpt.sequence_length=2048"),
    steps=3,
    warmup_steps=1,
)
for _rank, _tiny_rank in ((0, 0), (31, 3)):  # on the torch backend, which needs no Transformer Engine
    ROWS[f"rank-{_rank}"] = Row(
        "cpt-qwen2.5-72b-4n8g-tp8pp4-fp8",
        ("model.size=72b", "model.backend=torch"),
        kind="rank",
        rank=_rank,
        steps=2,
        warmup_steps=1,
        tiny=(
            "model.shape.hidden_size=256",
            "model.shape.ffn_hidden_size=512",
            "layout.nodes=1",
            "layout.gpus_per_node=4",
            "layout.tp=2",
            "layout.pp=2",
            "layout.vpp=1",
        ),
        tiny_rank=_tiny_rank,
    )
