"""Memory and CPU time of the head on a CPU: `fused_linear_logprob` against logits written out.

Usage: python tools/kernels/head_cpu.py [--tokens 2048] [--hidden 512] [--vocab 152064] [--repeats 3] [--document PATH]

Every measurement is a process of its own. Memory is the growth of the process's peak (VmHWM, reset before) over what
it held with the inputs made, so weight gradients count and inputs do not. CPU time is user + system time of all
threads, the least of the repeats.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_medllm.bench.process import cpu_model, cpu_seconds, peak_mib, reset_peak, resident_mib
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.storage import atomic_write

BASELINES = {"uniform": "written out", "general": "written out", "frozen": "written out, frozen", "score": None}
VARIANTS = ("written out", "uniform", "general", "written out, frozen", "frozen", "score")
# (least ratio of memory, greatest ratio of CPU time) against the logits written out
TARGETS = {"uniform": (6.0, 1.05), "general": (6.0, 1.6), "frozen": (12.0, 1.05)}


def main() -> int:
    """Measure, print, write the document where asked; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--threads", type=int, default=1, help="1: threads that wait for each other spin")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure_here(arguments)))
        return 0
    results = {variant: measure(variant, arguments) for variant in VARIANTS}
    check_agreement(results)
    lines = table(results)
    print("\n".join(lines))
    if arguments.document:
        write_document(arguments.document, lines, arguments)
    return int(any("missed" in line for line in lines))


def measure(variant: str, arguments: argparse.Namespace) -> dict:
    """The least memory and CPU time over the repeats, each in a new process."""
    command = [sys.executable, __file__, "--variant", variant]
    for name in ("tokens", "hidden", "vocab", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    runs = []
    for _ in range(arguments.repeats):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
    return {key: min(run[key] for run in runs) for key in ("peak_mib", "cpu_s", "wall_s")} | {
        key: runs[0][key] for key in ("hidden_grad", "weight_grad", "logprobs")
    }


def measure_here(arguments: argparse.Namespace) -> dict:
    """Forward and backward of one variant in this process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    frozen, fused = "frozen" in arguments.variant, "written" not in arguments.variant
    hidden = torch.randn(arguments.tokens, arguments.hidden, requires_grad=arguments.variant != "score")
    weight = (torch.randn(arguments.vocab, arguments.hidden) * 0.05).requires_grad_(
        not frozen and arguments.variant != "score"
    )
    target = torch.randint(0, arguments.vocab, (arguments.tokens,))
    upstream = torch.full((arguments.tokens,), -1.0 / arguments.tokens)  # `general` and `frozen` do not know of it
    reset_peak()
    held_mib, cpu_s, wall_s = resident_mib(), cpu_seconds(), time.perf_counter()
    if fused:
        uniform = -1.0 if arguments.variant == "uniform" else None
        logprobs, _ = fused_linear_logprob(hidden, weight, target, uniform_grad=uniform)
    else:
        logprobs = -F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    if logprobs.requires_grad:
        logprobs.backward(upstream)
    cpu_s, wall_s = cpu_seconds() - cpu_s, time.perf_counter() - wall_s
    return {
        "peak_mib": peak_mib() - held_mib,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "logprobs": logprobs.double().sum().item(),
        "hidden_grad": 0.0 if hidden.grad is None else hidden.grad.double().norm().item(),
        "weight_grad": 0.0 if weight.grad is None else weight.grad.double().norm().item(),
    }


def check_agreement(results: dict[str, dict]) -> None:
    """The same sum of log-probs and the same gradient norms as the logits written out, to 1e-5."""
    for name, baseline in BASELINES.items():
        for key in ("logprobs", "hidden_grad", "weight_grad") if baseline else ():
            ours, theirs = results[name][key], results[baseline][key]
            if abs(ours - theirs) > 1e-5 * abs(theirs):
                raise RuntimeError(f"{name}: {key} is {ours}, written out it is {theirs}")


def table(results: dict[str, dict]) -> list[str]:
    """Markdown rows; `missed` stands where a target is not met."""
    lines = ["| head | peak MiB | CPU s | wall s | memory | CPU time | target |", "|---|---|---|---|---|---|---|"]
    for name, row in results.items():
        baseline = BASELINES.get(name)
        memory = time_ratio = target = ""
        if baseline:
            saving, slowdown = (
                results[baseline]["peak_mib"] / row["peak_mib"],
                row["cpu_s"] / results[baseline]["cpu_s"],
            )
            memory, time_ratio = f"1/{saving:.1f}", f"{slowdown:.2f}x"
            least, most = TARGETS[name]
            met = saving >= least and slowdown <= most
            target = f"{'met' if met else 'missed'}: 1/{least:.0f}, {most}x"
        lines.append(
            f"| {name} | {row['peak_mib']:,.0f} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} "
            f"| {memory} | {time_ratio} | {target} |"
        )
    return lines


def write_document(path: Path, lines: list[str], arguments: argparse.Namespace) -> None:
    """The measurements with what they were taken on."""
    text = f"""# The head on a CPU

`fused_linear_logprob` (backend `torch`, fp32, default chunk) against `F.cross_entropy` on logits written out, forward
and backward, {arguments.tokens:,} tokens x {arguments.hidden} x {arguments.vocab:,} words. `general`: any
upstream gradient. `uniform`: upstream gradient known up to a factor (CPT). `frozen`: the weight takes no gradient
(LoRA). `score`: forward only. Memory is the growth of the process's peak over the inputs, weight gradient included;
ratios are against the row of logits written out with the same parameters trained.

{cpu_model()}, threads: {arguments.threads}, torch {torch.__version__}, Python {platform.python_version()}; least of
{arguments.repeats} runs. Command: `python tools/kernels/head_cpu.py --repeats {arguments.repeats} --document {path}`

Load average at the end: {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores. Where it is above the number of cores, wall
times say nothing and CPU times are rough; memory is exact either way.

"""
    with atomic_write(path) as stream:
        stream.write((text + "\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
