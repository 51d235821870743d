"""`medllm release`: what one uploads of a finished run, and the chain of digests from its text to its exam."""
