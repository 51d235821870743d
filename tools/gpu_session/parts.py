"""The parts of the session: what each runs, for how long at most, and where its rows appear."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import TRAIN

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent


@dataclass(frozen=True)
class Part:
    """`command(folder, rows, tiny)` writes rows under `folder`; `read(folder, log)` finds those written so far.

    Where `rows` names them, the command is given the names that are still open and started again for the rest when it
    ends or a row outlasts `row_limit_s`.
    """

    about: str
    limit_s: float
    command: Callable[[Path, list[str], bool], list[str]]
    read: Callable[[Path, Path], list[dict[str, Any]]]
    rows: tuple[str, ...] = ()
    row_limit_s: float = 0.0


def json_lines(name: str) -> Callable[[Path, Path], list[dict[str, Any]]]:
    """Reads FOLDER/name; a last line that is still being written is left for later."""

    def read(folder: Path, _: Path) -> list[dict[str, Any]]:
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    return read


def pytest_rows(_: Path, log: Path) -> list[dict[str, Any]]:
    """One row a test that has ended, from the lines of `pytest -v`, with or without pytest-xdist."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    alone = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", text, re.MULTILINE)
    beside = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/.+?) *$", text, re.MULTILINE)
    found = alone + [(name, result) for result, name in beside]
    return [{"row": name.removeprefix("tests/"), "result": result.lower()} for name, result in found]


def training(folder: Path, rows: list[str], tiny: bool) -> list[str]:
    return [str(HERE / "rows.py"), "--out", str(folder), "--rows", *rows, *["--tiny"] * tiny]


def kernels(*sections: str) -> Callable[[Path, list[str], bool], list[str]]:
    def command(folder: Path, _: list[str], tiny: bool) -> list[str]:
        tool = [str(TOOLS / "kernels" / "one_gpu.py"), "--out", str(folder)]
        return [*tool, "--only", "7B", "--sections", *sections, *["--tiny"] * tiny]

    return command


def attention(folder: Path, _: list[str], tiny: bool) -> list[str]:
    return [str(TOOLS / "kernels" / "attention_gpu.py"), "--out", str(folder), *["--tiny"] * tiny]


def peers(*names: str) -> Callable[[Path, list[str], bool], list[str]]:
    def command(folder: Path, _: list[str], tiny: bool) -> list[str]:
        tool = [str(TOOLS / "peers" / "liger_trl_7b.py"), "--out", str(folder / "rows.jsonl")]
        return [*tool, "--exact", "--rows", *names, "--row-limit-s", "75", *["--tiny"] * tiny]

    return command


def gpu_tests(*paths: str) -> Callable[[Path, list[str], bool], list[str]]:
    def command(folder: Path, _: list[str], tiny: bool) -> list[str]:
        chosen = ["tests/unit/bench/test_process.py"] if tiny else list(paths)  # tests/gpu skips without a device
        # Side by side: most of a test's time is its processes' start, and their models are small.
        beside = [] if tiny else ["-n", "6"]
        return ["-m", "pytest", "-v", *beside, "-rfE", "-W", "ignore", "-p", "no:cacheprovider", "--timeout", "100",
                "-o", "addopts=--strict-markers --import-mode=importlib", "--basetemp", str(folder / "tmp"),
                *chosen]  # fmt: skip

    return command


TRAIN_ON = "tests/gpu/test_train_on_gpu.py"
UNSEEN = [
    "tests/gpu/test_model.py",
    f"{TRAIN_ON}::test_pretraining_learns_resumes_and_exports",
    f"{TRAIN_ON}::test_preference_training_starts_at_margin_zero",
]
ROW_FILE = json_lines("rows.jsonl")
PARTS: dict[str, Part] = {
    "ceilings": Part("bf16 products, copies", 30, kernels("ceilings"), ROW_FILE),
    "attention": Part("attention kernels against fp32", 75, attention, ROW_FILE),
    "train": Part("7B rows with switches on and off", 200, training, ROW_FILE, tuple(TRAIN), 90),
    "peers": Part(
        "HF + peft + Liger, 8,192 whole and 4,096 packed", 90, peers("cpt 8192", "cpt 4096 packed"), ROW_FILE
    ),
    "dpo": Part("TRL + Liger", 75, peers("dpo precomputed"), ROW_FILE),
    "tests": Part("tests of resume, contexts, attention and models", 100, gpu_tests(*UNSEEN), pytest_rows),
    "all-tests": Part("all of tests/gpu", 200, gpu_tests("tests/gpu"), pytest_rows),
    "kernels": Part(
        "head and FP8 linears at 7B, beside Liger", 75, kernels("head-check", "head", "linears", "recipes"), ROW_FILE
    ),
    "full": Part("all parameters of 7B", 75, training, ROW_FILE, ("full-7b",), 75),
    "72b": Part("72B, LoRA on an FP8 base", 100, training, ROW_FILE, ("lora-72b-fp8",), 100),
    "ranks": Part("one rank of TP8 PP4", 60, training, ROW_FILE, ("rank-0", "rank-31"), 45),
}
