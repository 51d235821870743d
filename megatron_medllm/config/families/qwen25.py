"""Qwen2.5 (arXiv 2412.15115), dense. From the published config.json of each Qwen/Qwen2.5-* base model."""

from megatron_medllm.config.families.family import Family, Size

FAMILY = Family(
    name="Qwen2.5",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    qk_norm=False,
    head_dim=None,
    licence="Apache 2.0; 3B: Qwen Research License; 72B: Qwen License",
    sizes={
        "mini": Size(2, 64, 4, 2, 192, 1024, tied=True, rotary_base=1e4),  # the miniature world's own
        "0.5b": Size(24, 896, 14, 2, 4864, 151936, tied=True),
        "1.5b": Size(28, 1536, 12, 2, 8960, 151936, tied=True),
        "3b": Size(36, 2048, 16, 2, 11008, 151936, tied=True),
        "7b": Size(28, 3584, 28, 4, 18944, 152064, tied=False),
        "14b": Size(48, 5120, 40, 8, 13824, 152064, tied=False, epsilon=1e-5),
        "32b": Size(64, 5120, 40, 8, 27648, 152064, tied=False, epsilon=1e-5),
        "72b": Size(80, 8192, 64, 8, 29568, 152064, tied=False, epsilon=1e-5),
    },
)
