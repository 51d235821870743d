"""Behaves like the trainer towards its supervisor, without a model:

    python fake_trainer.py RUN STEPS [crash-at STEP | wait-at STEP]

Steps take 0.05 s. At the step of `wait-at` it stands still until it is told to save, or until RUN/go is there: whatever
is done to it meets it there, however slow the machine. A checkpoint is an empty directory, written every 20 steps and
on USR1 or TERM (exit 85), and it resumes from the newest. Rank 0 alone writes.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    run, steps = Path(sys.argv[1]), int(sys.argv[2])
    event, at = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 4 else ("", -1)
    rank = int(os.environ.get("RANK", "0"))
    asked = []
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, lambda number, _: asked.append(number))
    checkpoints = run / "cpt" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
    while step < steps:
        time.sleep(0.05)
        if event == "wait-at" and step == at and not asked and not (run / "go").exists():
            continue
        step += 1
        if rank == 0:
            with open(run / "cpt" / "metrics.jsonl", "a") as stream:
                stream.write(f'{{"step": {step}, "step_time_s": 0.1, "tokens_per_s": 640.0}}\n')
            if step % 20 == 0 or asked:
                (checkpoints / f"step-{step:08d}").mkdir(exist_ok=True)
        if event == "crash-at" and step == at:
            sys.exit(f"rank {rank}: the reactor is on fire")
        if asked:
            time.sleep(0.5 if rank == 0 else 1.5)  # ranks never leave at the same moment
            sys.exit(85)


if __name__ == "__main__":
    main()
