"""Qwen3 (arXiv 2505.09388), dense: heads of a width of their own, norms on queries and keys, no biases.

From the published config.json of each Qwen/Qwen3-*-Base; of 32B no base model was published.
"""

from megatron_medllm.config.families.family import Family, Size

FAMILY = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias=False,
    qk_norm=True,
    head_dim=128,
    licence="Apache 2.0",
    sizes={
        "qwen3-0.6b": Size(28, 1024, 16, 8, 3072, 151936, tied=True),
        "qwen3-1.7b": Size(28, 2048, 16, 8, 6144, 151936, tied=True),
        "qwen3-4b": Size(36, 2560, 32, 8, 9728, 151936, tied=True),
        "qwen3-8b": Size(36, 4096, 32, 8, 12288, 151936, tied=False),
        "qwen3-14b": Size(40, 5120, 40, 8, 17408, 151936, tied=False),
        "qwen3-32b": Size(64, 5120, 64, 8, 25600, 151936, tied=False, max_positions=40960),
    },
)
