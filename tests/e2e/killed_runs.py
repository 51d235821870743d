"""Runs one recipe through, and kills another again and again with SIGKILL and lets it resume.

`python tests/e2e/killed_runs.py WHOLE KILLED KILLS` prints how often it killed. Every attempt is a forked child, so
that the imports are paid for once. It is killed a random time after a random number of steps, its checkpoint writers
with it.
"""

import gc
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.train.loop import train

LONGEST_WAIT_S = 0.15  # a step and a save take about this long


def attempt(run: RunConfig) -> int:
    """Start the run in a child with a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(train(run))
    return child


def logged_steps(run: RunConfig) -> int:
    path = run.output_dir() / "metrics.jsonl"
    return path.read_bytes().count(b'"loss":') if path.is_file() else 0


def kill_later(run: RunConfig, child: int, chance: random.Random) -> bool:
    """Let the child make a few steps, then kill it; False if it ended before."""
    time_left = time.monotonic() + 60
    seen, steps = logged_steps(run), chance.randint(1, 4)
    while steps and time.monotonic() < time_left:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        now = logged_steps(run)
        steps -= now > seen
        seen = now
        time.sleep(0.002)
    time.sleep(chance.uniform(0, LONGEST_WAIT_S))
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> int:
    whole, run = (load(Path(recipe), []) for recipe in sys.argv[1:3])
    torch.set_num_threads(1)  # a forked child cannot use its parent's threads
    gc.freeze()  # upstream collects garbage before every save: let it not look through all the imports
    chance = random.Random(0)
    kills = 0
    while kills < int(sys.argv[3]) and kill_later(run, attempt(run), chance):
        kills += 1
    statuses = [os.waitstatus_to_exitcode(os.waitpid(attempt(each), 0)[1]) for each in (run, whole)]
    print(f"kills {kills}")
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
