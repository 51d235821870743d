"""Text from a model: one protocol, three engines (transformers, vLLM in its own environment, an HTTP endpoint)."""
