"""`medllm release verify`: every file of a release, and of the run behind it, against provenance.json."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_medllm.errors import UserError
from megatron_medllm.release.chain import OUTSIDE, THREADS, Inventory, digest_like
from megatron_medllm.release.finished_run import FinishedRun
from megatron_medllm.release.provenance_file import NAME, read_provenance

RELEASE = "release"


@dataclass(frozen=True)
class Verified:
    """`files` were read; `wrong` holds (stage, what is wrong), in the chain's order, the release's own files last."""

    files: int
    stages: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """The result for people."""
        if not self.wrong:
            return [f"verified: {self.files} files of {', '.join(self.stages)}"]
        return [f"does not match: stage {self.wrong[0][0]}", *(f"{stage}: {problem}" for stage, problem in self.wrong)]


def verify_release(directory: Path, run_dir: Path | None) -> Verified:
    """Read everything again.

    Args:
        directory: what `medllm release` wrote, perhaps downloaded since.
        run_dir: the run behind it; None: the release's own files only.

    Raises:
        UserError: `directory` is no release, or `run_dir` no run directory.
    """
    if not (directory / NAME).is_file():
        raise UserError(f"{directory}: holds no {NAME}; expected what medllm release wrote")
    try:
        provenance = read_provenance(directory / NAME)
    except UserError as error:
        return Verified(1, (RELEASE,), ((RELEASE, str(error)),))
    expected: dict[str, dict[str, str]] = {}
    if run_dir is not None:
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such directory")
        expected = {part["stage"]: part["files"] for part in provenance["chain"]}
    places = {
        (stage, label): run_dir / label
        for stage, files in expected.items()
        for label in files
        if run_dir is not None and not label.startswith(OUTSIDE)
    }
    expected[RELEASE] = provenance["files"]
    places |= {(RELEASE, label): directory / label for label in provenance["files"]}
    wrong = _compare(expected, places)
    if run_dir is not None and not wrong:  # what says where the other files lie is as it was
        outside = _outside(FinishedRun.open(run_dir, provenance["model"]), expected)
        places |= outside
        wrong = _compare(expected, outside)
    strays = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    wrong |= {
        (RELEASE, name): "is no part of the release" for name in strays if name not in {NAME, *provenance["files"]}
    }
    order = list(expected)
    found = sorted(wrong.items(), key=lambda item: order.index(item[0][0]))
    return Verified(len(places), tuple(order), tuple((stage, f"{label} {why}") for (stage, label), why in found))


_Place = tuple[str, str]  # stage and label


def _outside(run: FinishedRun, expected: Mapping[str, Mapping[str, str]]) -> dict[_Place, Path]:
    """Where the files lie that are not in the run directory; found by the run's own manifests."""
    found = {
        (stage, label): path
        for stage, files in Inventory(run).stages.items()
        for label, path in files.items()
        if label.startswith(OUTSIDE)
    }
    missing = [place for stage, files in expected.items() for label in files if (place := (stage, label)) not in found]
    unknown = [place for place in missing if place[1].startswith(OUTSIDE)]
    if unknown:
        raise UserError(f"chain: stage {unknown[0][0]}: the run no longer names {unknown[0][1]}")
    return {place: path for place, path in found.items() if place[1] in expected.get(place[0], {})}


def _compare(expected: Mapping[str, Mapping[str, str]], places: Mapping[_Place, Path]) -> dict[_Place, str]:
    """What is wrong with each file that is not as it was."""
    with ThreadPoolExecutor(THREADS) as pool:
        known = [expected[stage][label] for stage, label in places]
        found = zip(places, pool.map(_digest, places.values(), known), strict=True)
        return {
            (stage, label): "is missing" if digest is None else "does not match its digest"
            for (stage, label), digest in found
            if digest != expected[stage][label]
        }


def _digest(path: Path, known: str) -> str | None:
    try:
        return digest_like(path, known)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
