"""GPU kernels, each with a plain torch twin: `logprob` (the head) and `fp8` (block-scaled linears)."""
