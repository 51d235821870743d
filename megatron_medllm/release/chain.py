"""The chain of digests from the text that a model learned from to the exam that it sat.

A *stage* of the chain is a set of files. Each has a label: its path inside the run directory or, where it lies
elsewhere, `outside/NUMBER/NAME`, since a release is public and a hospital's paths are not. What produced a file may
have recorded its digest (manifests, checkpoints): then a release takes that, and only `verify` reads the terabytes.
Digests are SHA-256 but for those of corpora, which say so: `blake2b-256:…`.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_medllm.config.hf_files import weight_files
from megatron_medllm.corpus.worker import digest_path
from megatron_medllm.errors import UserError
from megatron_medllm.exams import loading
from megatron_medllm.release.finished_run import RECIPE, FinishedRun
from megatron_medllm.storage import digest_file, read_json

THREADS = 8  # one does not saturate a file system that is worth a 72B model
OUTSIDE = "outside/"
_BLAKE = "blake2b-256:"
_STEP = "step-*"
_CHECKPOINT_DIGESTS = "digests.json"
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

Files = dict[str, Path]  # by label


class Inventory:
    """Which files each stage of the chain consists of, in the chain's order, and the digests that are on record."""

    def __init__(self, run: FinishedRun) -> None:
        """Find them all.

        Raises:
            UserError: a stage is missing (named).
        """
        self._run = run
        self.stages: dict[str, Files] = {}
        self.recorded: dict[Path, str] = {}
        self._add("recipe", [run.directory / RECIPE])
        self._base_model()
        self._text_and_corpus()
        for training in run.lineage():
            suffix = run.round_suffix(training)
            if suffix is not None:
                self._preference_data(suffix)
            self._training(training)
        self._exam()

    def digests(self) -> list[dict[str, Any]]:
        """The chain as JSON: `stage` and `files`, digest by label.

        Raises:
            UserError: a file is missing.
        """
        found = []
        for stage, files in self.stages.items():
            unknown = {label: path for label, path in files.items() if path not in self.recorded}
            read = dict(zip(unknown, digest_files(unknown.values(), stage), strict=True))
            known = {label: self.recorded[path] for label, path in files.items() if path in self.recorded}
            found.append({"stage": stage, "files": {label: (read | known)[label] for label in files}})
        return found

    def by_path(self, chain: list[dict[str, Any]]) -> dict[Path, str]:
        """The digests of `digests`, by where the files lie."""
        return {self.stages[part["stage"]][label]: digest for part in chain for label, digest in part["files"].items()}

    def _add(self, stage: str, paths: Iterable[Path]) -> None:
        files = self.stages.setdefault(stage, {})
        for path in paths:
            inside = path.is_relative_to(self._run.directory)
            label = path.relative_to(self._run.directory).as_posix() if inside else f"{OUTSIDE}{len(files)}/{path.name}"
            files[label] = path

    def _add_record(self, stage: str, name: str) -> None:
        """What the pipeline remembers of the stage that made these files; runs on Slurm may keep none."""
        path = self._run.directory / "stages" / f"{name}.json"
        if path.is_file():
            self._add(stage, [path])

    def _base_model(self) -> None:
        base = self._run.base_dir()
        if base is None:
            return
        first = self._run.directory / "stages" / f"{self._run.lineage()[0]}.json"
        parts = read_json(first)["parts"] if first.is_file() else {}
        known = {
            Path(name.removeprefix("input ")): digest for name, digest in parts.items() if name.startswith("input ")
        }
        named = {self._run.place(path): digest for path, digest in known.items()}
        paths = [path for path in named if path.is_relative_to(base)]
        if not paths:
            if not base.is_dir():
                raise UserError(f"chain: stage base model is missing: {base}: no such directory")
            paths = sorted(path for path in base.iterdir() if path.name.endswith(_MODEL_SUFFIXES))
        self.recorded |= {path: named[path] for path in paths if path in named}
        self._add("base model", paths)

    def _text_and_corpus(self) -> None:
        for name, folder in self._run.corpora().items():
            manifest = self._run.manifest(name)
            texts = {self._run.place(path): _BLAKE + digest for path, digest in manifest.get("inputs", {}).items()}
            outputs = {folder / file: _BLAKE + digest for file, digest in manifest["outputs"].items()}
            for path in outputs:
                if not path.is_file():
                    raise UserError(f"chain: stage corpus is missing: {path}: no such file")
            self.recorded |= texts | outputs
            self._add("text", texts)
            self._add("corpus", [folder / "manifest.json", *outputs])
            self._add_record("corpus", f"corpus-{name}")

    def _training(self, training: str) -> None:
        stage = "model" if training == self._run.model else f"checkpoint {training}"
        hf_dir = self._run.hf_dir(training)
        if not hf_dir.is_dir():
            raise UserError(f"chain: stage {stage} is missing: {hf_dir}: no such directory")
        self._add(stage, [path for path in [self._run.exported_path(training)] if path.is_file()])
        for folder in self._checkpoint(training):
            path = folder / _CHECKPOINT_DIGESTS
            recorded = {folder / name: digest for name, digest in read_json(path).items()} if path.is_file() else {}
            self.recorded |= recorded
            self._add(stage, [path, *recorded] if recorded else sorted(p for p in folder.rglob("*") if p.is_file()))
        self._add(stage, [*weight_files(hf_dir), *_beside_weights(hf_dir)])
        self._add_record(stage, training)

    def _checkpoint(self, training: str) -> list[Path]:
        """The checkpoint that the export was made of: the best step's, or else the newest; none where none is kept."""
        kept = sorted((self._run.directory / training / "checkpoints").glob(_STEP))
        step = self._run.exported(training).get("step")
        return [folder for folder in kept if step is None or folder.name == f"step-{step:08d}"][-1:]

    def _preference_data(self, suffix: str) -> None:
        run, name = self._run, f"pairs{suffix}"
        assert run.config.rpo is not None
        folder = run.directory / name
        if run.config.pairs is not None:
            manifest = _manifest(folder / "manifest.json", name)
            self._add(name, [folder / "manifest.json", folder / "pairs.jsonl"])
            self._add(name, self._questions(manifest["config"]["questions"]["data"], name))
            self._add_record(name, name)
        else:
            self._add(name, [run.place(run.config.rpo.pairs)])
        reference = run.directory / f"reference{suffix}"
        _manifest(reference / "key.json", reference.name)
        self._add(reference.name, [reference / "key.json", *sorted(reference.glob("part-*.parquet"))])
        self._add_record(reference.name, f"score{suffix}")

    def _exam(self) -> None:
        folder = self._run.exam_dir
        summary = exam_summary(self._run)
        self._add("exam", [folder / name for name in ("summary.json", "results.jsonl", "answers.jsonl")])
        self._add("exam", self._questions(summary["config"]["exam"]["data"], "exam"))
        self._add_record("exam", f"eval-{self._run.model}")

    def _questions(self, data: list[str], stage: str) -> list[Path]:
        try:
            return loading.question_files([self._run.place(path) for path in data])
        except UserError as error:
            raise UserError(f"chain: stage {stage}: its questions are missing: {error}") from None


def _beside_weights(hf_dir: Path) -> list[Path]:
    suffixes = tuple(suffix for suffix in _MODEL_SUFFIXES if suffix != ".safetensors")
    return sorted(path for path in hf_dir.iterdir() if path.name.endswith(suffixes))


def _manifest(path: Path, stage: str) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except UserError as error:
        raise UserError(f"chain: stage {stage} is missing or broken: {error}") from None


def exam_summary(run: FinishedRun) -> dict[str, Any]:
    """What the released model's evaluation found.

    Raises:
        UserError: it was never examined.
    """
    path = run.exam_dir / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{run.directory}: its model {run.model!r} has not sat an exam (no {path.relative_to(run.directory)}); "
            "add a section eval to the recipe and run medllm pipeline again"
        )
    return dict(read_json(path))


def digest_like(path: Path, known: str) -> str:
    """A file's digest, by the algorithm of `known`."""
    return _BLAKE + digest_path(str(path)) if known.startswith(_BLAKE) else digest_file(path)


def digest_files(paths: Iterable[Path], stage: str) -> list[str]:
    """SHA-256 of files, several at a time.

    Raises:
        UserError: one cannot be read.
    """
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(digest_file, paths))
    except OSError as error:
        raise UserError(f"chain: stage {stage}: {error.filename}: {error.strerror}") from None
