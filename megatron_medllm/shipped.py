"""Files that come with the package but are no code: batch scripts and example recipes.

In a checkout they lie at its top, where people look for them; a wheel carries a copy inside the package (setup.py).
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The folder `slurm` or `examples`, of the wheel or of the checkout."""
    installed = PACKAGE / "shipped_files" / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder
