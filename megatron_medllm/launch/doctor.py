"""Checks the installation: what is missing, which features need it, and how to get it (`medllm doctor`)."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_medllm.provenance import installed_version

DISTRIBUTION = "megatron-medllm"
SUPPORTED_PYTHON = ">=3.11,<3.14"
LOW_DISK_BYTES = 10 * 2**30

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One finding: `ok`, `note` (works, with less than there could be) or `fail` (something will not work)."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Extra:
    """An optional package: what it adds, and how to get it."""

    name: str
    module: str
    distributions: tuple[str, ...]
    adds: str
    get: str
    needs_gpu: bool = True


@dataclass(frozen=True)
class Pair:
    """Versions of a package that need certain versions of another one (or of Python)."""

    package: str
    versions: str
    other: str
    needs: str
    advice: str


PAIRS = (
    Pair("megatron-core", ">=0.17", "python", ">=3.12", "on Python 3.11: pip install megatron-core==0.16.1"),
    Pair("megatron-core", ">=0.18", "triton", ">=3", "it imports triton on a CPU too: pip install 'triton>=3.6,<3.8'"),
)

EXTRAS = (
    Extra(
        "transformer-engine",
        "transformer_engine",
        ("transformer-engine", "transformer_engine"),
        "fused layers, FP8 GEMMs and communication overlap (model.backend=te)",
        "use an NGC PyTorch container, or on a CUDA machine: tools/build_cuda_extras.sh te",
    ),
    Extra(
        "apex",
        "apex",
        ("apex",),
        "the fused Adam and gradient-accumulation kernels; without it torch's own are used",
        "use an NGC PyTorch container, or build NVIDIA/apex: tools/build_cuda_extras.sh apex "
        "('pip install apex' is an unrelated project)",
    ),
    Extra(
        "triton",
        "triton",
        ("triton",),
        "our fused head and FP8 quantisation kernels; without it their plain torch twins run",
        "comes with torch's CUDA builds for Linux; on a CPU it serves kernel tests only: pip install triton",
    ),
    Extra(
        "bitsandbytes",
        "bitsandbytes",
        ("bitsandbytes",),
        "NF4 base weights for QLoRA",
        "pip install 'megatron-medllm[nf4]'",
    ),
    Extra(
        "vllm",
        "vllm",
        ("vllm",),
        "fast sampling and evaluation; without it transformers generates",
        "install it in a virtual environment of its own (it pins torch): pip install vllm",
    ),
)


def doctor(directory: Path = Path(".")) -> list[Finding]:
    """Look at this machine. `directory` is where runs will be written (for the disk check).

    Returns:
        The findings in the order to show them; any `fail` means that something the project needs is missing.
    """
    gpus = visible_gpus()
    checks = [
        python_check(),
        *requirement_checks(),
        *pair_checks(),
        torch_check(gpus),
        gpu_check(gpus),
        apex_namesake_check(),
    ]
    checks += [extra_check(extra, has_gpu=bool(gpus)) for extra in EXTRAS]
    checks += [disk_check(directory), processor_check(), slurm_check()]
    return [check for check in checks if check is not None]


def failed(checks: list[Finding]) -> bool:
    """Whether something that is needed is missing."""
    return any(check.status == "fail" for check in checks)


def python_check() -> Finding:
    """The interpreter's version against the supported range."""
    version = platform.python_version()
    if SpecifierSet(SUPPORTED_PYTHON).contains(version):
        return Finding("python", "ok", f"{version} ({sys.executable})")
    return Finding("python", "fail", version, f"python {SUPPORTED_PYTHON} is needed")


def requirement_checks(distribution: str = DISTRIBUTION) -> list[Finding]:
    """Every declared dependency that is absent or outside its range; one `ok` line when there is none."""
    try:
        declared = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("packages", "fail", f"{distribution} is not installed", "run: pip install -e .")]
    base = [r for r in map(Requirement, declared) if r.marker is None or r.marker.evaluate({"extra": ""})]
    problems = []
    for requirement in base:
        version = installed_version(requirement.name)
        if version is None:
            problems.append(Finding(requirement.name, "fail", "not installed", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            advice = f"the tested range is {requirement.specifier}: pip install '{requirement}'"
            problems.append(Finding(requirement.name, "fail", version, advice))
    if problems:
        return problems
    core = installed_version("megatron-core")
    return [Finding("packages", "ok", f"{len(base)} requirements met; megatron-core {core}")]


def pair_checks() -> list[Finding]:
    """Installed versions that do not work with each other, though each may be within its own range."""
    found = []
    for pair in PAIRS:
        version, other = installed_version(pair.package), _version_of(pair.other)
        if version is None or version not in SpecifierSet(pair.versions):
            continue
        if other is None or not SpecifierSet(pair.needs).contains(other, prereleases=True):
            here = f"{version} with {pair.other} {other}" if other else f"{version} without {pair.other}"
            found.append(Finding(pair.package, "fail", here, pair.advice))
    return found


def _version_of(name: str) -> str | None:
    return platform.python_version() if name == "python" else installed_version(name)


def visible_gpus() -> list[str]:
    """One line per GPU, as the driver sees them; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def torch_check(gpus: list[str]) -> Finding:
    """Torch's build, and whether it can use the GPUs that the driver sees."""
    version = installed_version("torch")
    if version is None:
        return Finding("torch", "fail", "not installed", "pip install torch")
    import torch  # late: importing it takes seconds, and the lines above must not need it

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if gpus and not torch.cuda.is_available():
        why = (
            "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}; is the driver old?"
        )
        return Finding("torch", "fail", f"{version}, {build}", f"the machine has GPUs but torch cannot use them: {why}")
    return Finding("torch", "ok", f"{version}, {build}")


def gpu_check(gpus: list[str]) -> Finding:
    """The GPUs, or what running without one means."""
    if not gpus:
        return Finding(
            "gpu",
            "note",
            "none",
            "everything runs on the CPU over gloo: right for the miniature and for tests, not for 0.5B and up",
        )
    names = "; ".join(sorted({f"{gpus.count(g)} x {g}" for g in gpus}))
    return Finding("gpu", "ok", names)


def extra_check(extra: Extra, *, has_gpu: bool) -> Finding:
    """Whether an optional package is there, what it adds, and how to get it."""
    version = next((v for d in extra.distributions if (v := installed_version(d))), None)
    present = importlib.util.find_spec(extra.module) is not None
    if extra.name == "transformer-engine" and present and not has_gpu:
        advice = "without its CUDA core it breaks `import megatron.core` on a CPU: pip uninstall transformer-engine"
        return Finding(extra.name, "fail", version or "installed", advice)
    if present:
        return Finding(extra.name, "ok", version or "installed (no version metadata)")
    where = "" if has_gpu or not extra.needs_gpu else " (GPU machines only)"
    return Finding(extra.name, "note", "absent", f"adds {extra.adds}{where}. To get it: {extra.get}")


def apex_namesake_check() -> Finding | None:
    """PyPI's `apex` is another project: say so when that is what is installed."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("apex.optimizers") is not None:
        return None
    return Finding(
        "apex",
        "fail",
        "PyPI's unrelated 'apex'",
        "pip uninstall apex; NVIDIA's is built by tools/build_cuda_extras.sh apex",
    )


def disk_check(directory: Path) -> Finding:
    """Free space where runs go."""
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.0f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "fail", found, f"{place} is not writable")
    if free < LOW_DISK_BYTES:
        return Finding("disk", "note", found, "checkpoints are large: see `medllm plan CONFIG` for their size")
    return Finding("disk", "ok", found)


def processor_check() -> Finding:
    """Usable CPU cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if importlib.util.find_spec("psutil") is None:
        return Finding(
            "cpu", "fail", f"{cores} cores", "psutil is missing: saving a checkpoint would hang. pip install psutil"
        )
    import psutil

    return Finding("cpu", "ok", f"{cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory")


def slurm_check() -> Finding:
    """Whether `medllm submit` can reach a Slurm."""
    if shutil.which("sbatch") is None:
        return Finding(
            "slurm", "note", "no sbatch here", "`medllm submit` works on a Slurm login node; --dry-run everywhere"
        )
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        return Finding(
            "slurm", "note", "sbatch without a working slurm.conf", (done.stderr.strip().splitlines() or [""])[0]
        )
    return Finding("slurm", "ok", done.stdout.strip())


def doctor_report(checks: list[Finding]) -> str:
    """The findings as aligned plain text, advice on its own line below each."""
    lines = []
    width = max(len(check.name) for check in checks)
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<{width + 8}}{check.advice}")
    return "\n".join(lines)
