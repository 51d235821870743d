"""The optimizer where neither Transformer Engine nor apex brings one: on a CPU, and on CUDA with torch alone.

Megatron's distributed optimizer saves and loads `step` from the parameter group and `exp_avg`, `exp_avg_sq` from the
state. With torch.optim.AdamW, which keeps `step` per parameter, a run trains but cannot resume: loading fails.
"""

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with the surface of TE's and apex's FusedAdam, on torch's own fused kernel."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if not bias_correction or capturable:
            raise ValueError("torch's FusedAdam has bias correction on and no CUDA-graph capture")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Megatron passes no closure
        """One update of every parameter that has a gradient."""
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.full((), float(group["step"]), device=params[0].device)] * len(params),  # no wait, as a copy is
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install(device_type: str) -> None:
    """Make it Megatron-Core's Adam, unless Transformer Engine or apex is there for a CUDA device.

    Args:
        device_type: "cuda" or "cpu"; their optimizers are CUDA kernels.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if device_type == "cuda" and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True
