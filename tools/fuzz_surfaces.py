"""Every fuzzed surface at many inputs: its seeds in processes of their own, as many at once as --jobs says.

Usage: python tools/fuzz_surfaces.py --inputs 10000 --jobs 2 --out DIR [--limit-s 3600] [--only test_fuzz_corpus]

DIR gets report.json ({surface: {inputs, refused, seconds}}), written after every process, and a log of each that
failed. What the time limit cut off is not counted. Exit 1 where an input was neither read right nor refused.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

SHARE = 2500  # inputs of one process; ten rounds, each from a seed of its own
SEEDS_A_SHARE = 10
ROOT = Path(__file__).resolve().parent.parent


def surfaces(only: str = "") -> list[str]:
    """The fuzz tests that take generated inputs, as pytest names them; those whose names hold `only`."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/fuzz"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [line for line in listed.splitlines() if "::" in line and only in line]


def run_share(test: str, first_seed: int, inputs: int, out: Path, until: float) -> tuple[dict, float, bool]:
    """Counts of each surface, processor-bound seconds, and whether every input was right or refused."""
    name = f"{test.rpartition('::')[2]}-{first_seed}"
    left = until - time.monotonic()
    if left < 1:
        return {}, 0.0, True
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        env = os.environ | {
            "FUZZ_EXAMPLES": str(inputs),
            "FUZZ_SEED": str(first_seed),
            "FUZZ_REPORT": str(report),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, f"--basetemp={folder}/tmp", test],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            return {}, time.monotonic() - start, True
        seconds = time.monotonic() - start
        if done.returncode:
            (out / f"{name}.log").write_bytes(done.stdout)
        return json.loads(report.read_text()) if report.exists() else {}, seconds, done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="a surface")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=3600.0)
    parser.add_argument("--only", default="", help="a part of the names (FILE::TEST) of those to run")
    args = parser.parse_args()
    tests = surfaces(args.only)
    if not tests:
        parser.error(f"--only {args.only}: no fuzz test's name holds it")
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.limit_s
    sizes = [min(SHARE, args.inputs - done) for done in range(0, args.inputs, SHARE)]
    inputs: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        shares = [
            pool.submit(run_share, test, i * SEEDS_A_SHARE, size, args.out, until)
            for i, size in enumerate(sizes)
            for test in tests
        ]
        for share in as_completed(shares):
            counts, took, right = share.result()
            failed += not right
            for surface, row in counts.items():
                inputs[surface] += row["inputs"]
                refused[surface] += row["refused"]
                seconds[surface] += took
            rows = {
                name: {"inputs": n, "refused": refused[name], "seconds": round(seconds[name])}
                for name, n in sorted(inputs.items())
            }
            (args.out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    print((args.out / "report.json").read_text())
    print(f"{failed} of {len(shares)} processes found an input that was neither read right nor refused")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
