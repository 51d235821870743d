"""The optimizer where neither Transformer Engine nor apex brings one: on a CPU, and on CUDA with torch alone.

Megatron's distributed optimizer saves and loads `step` from the parameter group and `exp_avg`, `exp_avg_sq` from the
state. With torch.optim.AdamW, which keeps `step` per parameter, a run trains but cannot resume: loading fails.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_medllm.parallel.moments import update_narrow

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) with the surface of TE's and apex's FusedAdam, on torch's own fused kernel.

    `moments_dtype` may be set to bf16 before the first step.
    """

    moments_dtype = torch.float32

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
            moments = [self._moments(p) for p in params]
            step = torch.full((), float(group["step"]), device=params[0].device)  # no wait, as a copy is
            settings = {
                "lr": group["lr"],
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "weight_decay": group["weight_decay"],
                "eps": group["eps"],
                "amsgrad": False,
                "maximize": False,
            }
            if self.moments_dtype is torch.bfloat16:
                update_narrow(update, params, moments, step=step, seed=group["step"], **settings)
            else:
                firsts, seconds = map(list, zip(*moments, strict=True))
                update(params, [p.grad for p in params], firsts, seconds, [], [step] * len(params), **settings)

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """The two moments, made or cast where they are missing or of another type (upstream makes them fp32)."""
        state = self.state[param]
        for name in MOMENTS:
            held = state.get(name)
            state[name] = torch.zeros_like(param, dtype=self.moments_dtype) if held is None else held
            state[name] = state[name].to(self.moments_dtype)
        return state["exp_avg"], state["exp_avg_sq"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the moments to the parameters' type, but these are held in their own."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                is_moment = name in MOMENTS
                self.state[param][name] = value.to(param.device, self.moments_dtype) if is_moment else value


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
