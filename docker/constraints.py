"""Write pip constraints: what this environment has stays, the rest gets the version of docker/versions.txt.

Runs before anything is installed: the standard library and pip alone. A torch outside the range of requirements.txt is
an error, exit status 2: an image is chosen for its torch.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
KEPT = ("torch", "triton", "transformer-engine", "nvidia-modelopt")  # never replaced, whatever else asks for it


def installed(name: str) -> str | None:
    """The version that the environment has."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lines(path: Path) -> list[str]:
    """The file's requirements that are for this Python, without comments."""
    texts = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [text for text in texts if text and ((marker := Requirement(text).marker) is None or marker.evaluate())]


def main() -> int:
    """Print the constraints; say on standard error what was found."""
    needed = {r.name: r for r in map(Requirement, lines(HERE.parent / "requirements.txt"))}
    torch = installed("torch")
    # NVIDIA's builds call themselves pre-releases: 2.12.0a0+abc.
    if torch is not None and not needed["torch"].specifier.contains(torch, prereleases=True):
        print(f"torch {torch} is here, {needed['torch']} is needed: take another base image", file=sys.stderr)
        return 2
    pinned = [text for text in lines(HERE / "versions.txt") if installed(re.split("[=<>]", text)[0]) is None]
    kept = [f"{name}=={found}" for name in KEPT if (found := installed(name)) is not None]
    print(f"kept: {', '.join(kept) or 'nothing'}; {len(pinned)} packages at tested versions", file=sys.stderr)
    print("\n".join([*kept, *pinned]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
