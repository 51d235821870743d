"""Everything that one GPU can show in ten minutes, part by part.

Usage: tools/gpu_session.sh OUT [PART[=SECONDS] ...] [--rows NAME ...] [--again] [--tiny] [--work DIR] [--limit-s N]
       tools/gpu_session.sh OUT --report
       tools/gpu_session.sh --list

Parts run in the order they are named (default: all but `all-tests`), each for at most its seconds. A part that fails
or runs out of time stops no other, and keeps the rows it had. OUT is the only state: results.jsonl grows as rows end,
and a part that came to its end there is skipped unless --again; of a part that was cut off, the rows without a result
are run. report.md and logs.tar.gz are written anew after every part. Nothing is needed but this package's requirements
and, for the peers, liger-kernel, trl and peft. `--tiny` runs the same code on tiny shapes, on a CPU too.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(HERE))

from parts import PARTS, Part  # noqa: E402
from report import report  # noqa: E402

POLL_S, KILL_AFTER_S = 0.3, 4.0
RESTART = 75  # exit status of rows.py: no row failed, a new process goes on
PACKAGES = ("torch", "triton", "transformers", "megatron-core", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13",
            "transformer-engine", "peft", "trl", "liger-kernel", "liger_kernel", "numpy")  # fmt: skip


SHOWN = ("row", "section", "name", "model", "layer", "stream", "heads", "variant", "ended", "seconds", "error",
         "step_ms", "tokens_per_s", "pairs_per_s", "peak_gib", "ms", "both_ms", "times_flash", "passed", "tflops",
         "result", "failed", "device", "forward_backward_s")  # fmt: skip


class Results:
    """OUT/results.jsonl: one line a row, appended as it is known."""

    def __init__(self, out: Path) -> None:
        self.path, self.out = out / "results.jsonl", out
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, part: str, **figures: Any) -> None:
        line = {"part": part, **figures}
        self.rows.append(line)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in figures.items() if name in SHOWN}
        print(f"[{part}]", " ".join(f"{name}={value}" for name, value in shown.items())[:240], flush=True)

    def is_done(self, part: str) -> bool:
        ends = [row for row in self.rows if row["part"] == part and "ended" in row]
        return bool(ends) and ends[-1]["ended"] == "done"

    def has_row(self, part: str, name: str) -> bool:
        return any(row["part"] == part and row.get("row") == name and "error" not in row for row in self.rows)

    def pack(self, work: Path) -> None:
        """report.md, and the logs as one file."""
        write_report(self.out, self.rows)
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for path in sorted(work.rglob("*")):
                if path.suffix in (".log", ".md", ".json", ".jsonl") and path.stat().st_size < 2**22:
                    archive.add(path, path.relative_to(work))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("parts", nargs="*", metavar="PART[=SECONDS]")
    parser.add_argument("--rows", nargs="+", default=[], help="of training parts, these alone and in this order")
    parser.add_argument("--again", action="store_true", help="also what OUT has a result of")
    parser.add_argument("--tiny", action="store_true", help="the same code on tiny shapes")
    parser.add_argument("--work", type=Path, help="folder of logs and working files; default OUT/work")
    parser.add_argument("--limit-s", type=float, default=3600, help="of all parts together")
    parser.add_argument("--report", action="store_true", help="only write OUT/report.md again, and print it")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    arguments = parser.parse_intermixed_args()  # parts may follow options
    if arguments.list or arguments.out is None:
        print("\n".join(f"{name:10} {part.limit_s:4.0f} s  {part.about}" for name, part in PARTS.items()))
        return 0 if arguments.list else 2
    limits = part_limits(parser, arguments.parts)
    out = arguments.out.resolve()
    if arguments.report:
        print(write_report(out, Results(out).rows))
        return 0
    work = (arguments.work or out / "work").resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    results = Results(out)
    signal.signal(signal.SIGTERM, on_term)
    deadline = time.monotonic() + arguments.limit_s
    results.add("session", **machine(), tiny=arguments.tiny)
    try:
        for name, limit_s in limits.items():
            if results.is_done(name) and not arguments.again:
                print(f"[{name}] has its results in {results.path}: skipped", flush=True)
                continue
            part = PARTS[name]
            chosen = [row for row in arguments.rows if row in part.rows] or list(part.rows)
            left_s = min(limit_s, deadline - time.monotonic())
            run_part(name, part, chosen, results, work, limit_s=left_s, tiny=arguments.tiny, again=arguments.again)
            results.pack(work)
    finally:
        results.pack(work)
        print(write_report(out, results.rows), flush=True)
    return 0


def write_report(out: Path, rows: list[dict[str, Any]]) -> str:
    """OUT/report.md; its text."""
    text = report(rows)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def on_term(*_: Any) -> NoReturn:
    raise SystemExit(143)


def part_limits(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, float]:
    """Seconds of each part, in the order they were named."""
    found = {}
    for word in words or [name for name in PARTS if name != "all-tests"]:
        name, _, seconds = word.partition("=")
        if name not in PARTS or (seconds and not seconds.replace(".", "", 1).isdigit()):
            parser.error(f"{word}: expected PART or PART=SECONDS of {', '.join(PARTS)}")
        found[name] = float(seconds) if seconds else PARTS[name].limit_s
    return found


def machine() -> dict[str, Any]:
    """Device, driver and versions, without starting CUDA here: a part has all of the device's memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        device = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        device = ""
    versions = {p.name: p.version for p in distributions() if p.name.lower() in PACKAGES}
    return {"device": device or "CPU", "python": platform.python_version(), "packages": versions}


def run_part(
    name: str, part: Part, wanted: list[str], results: Results, work: Path, *, limit_s: float, tiny: bool, again: bool
) -> None:
    """Run a part until its rows are there or its time is over; every row is added as it ends."""
    started = time.monotonic()
    folder, log = work / name, work / f"{name}-{int(time.time())}.log"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").unlink(missing_ok=True)  # of an earlier try: its rows are in the results
    todo = [row for row in wanted if again or not results.has_row(name, row)]
    open_rows, taken, ended = list(todo), 0, "done"
    while True:
        left_s = limit_s - (time.monotonic() - started)
        if left_s < 5:
            ended = "time limit"
            break
        before = len(open_rows)
        status, taken = watch(name, part, open_rows, results, (folder, log), taken, limit_s=left_s, tiny=tiny)
        if not part.rows:
            ended = "done" if status == 0 else "time limit" if status is None else f"exit status {status}"
            break
        if not open_rows:
            break
        if len(open_rows) == before and status != RESTART:  # it died or hung before it could say so
            why = "time limit" if status is None else f"exit status {status}: {last_line(log)}"
            results.add(name, row=open_rows.pop(0), error=why)
        elif len(open_rows) == before:
            ended = "a new process could not go on"
            break
    if part.rows and ended == "done" and not all(results.has_row(name, row) for row in todo):
        ended = "rows failed"
    results.add(name, ended=ended, seconds=round(time.monotonic() - started, 1), limit_s=round(limit_s))


def watch(
    name: str,
    part: Part,
    open_rows: list[str],
    results: Results,
    places: tuple[Path, Path],
    taken: int,
    *,
    limit_s: float,
    tiny: bool,
) -> tuple[int | None, int]:
    """One process of a part; rows that end are struck from `open_rows`.

    Returns:
        its exit status, None where it was ended at a limit, and how many rows of its file are known now.
    """
    folder, log = places
    command = [sys.executable, "-W", "ignore", *part.command(folder, open_rows, tiny)]
    path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if p)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, start_new_session=True
        )
    start = row_start = time.monotonic()
    try:
        while True:
            status = process.poll()
            for row in part.read(folder, log)[taken:]:
                taken, row_start = taken + 1, time.monotonic()
                results.add(name, **row)
                if row.get("row") in open_rows:
                    open_rows.remove(row["row"])
            if status is not None:
                return status, taken
            now = time.monotonic()
            if now - start > limit_s or (part.row_limit_s and now - row_start > part.row_limit_s):
                return None, taken
            time.sleep(POLL_S)
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ask the process and all that it started to end, then make them."""
    for sent, wait_s in ((signal.SIGTERM, KILL_AFTER_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
