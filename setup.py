"""Everything is in pyproject.toml, but for one step: a wheel carries the batch scripts and the example recipes."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"slurm": ("*.sbatch", "*.sh"), "examples": ("*.yaml",)}


class BuildWithShippedFiles(build_py):
    """Copies slurm/ and examples/ into the package that is being built (megatron_medllm/shipped.py finds them)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout itself is imported
            return
        for folder, patterns in SHIPPED.items():
            target = Path(self.build_lib) / "megatron_medllm" / "shipped_files" / folder
            target.mkdir(parents=True, exist_ok=True)
            for pattern in patterns:
                for path in sorted(Path(folder).glob(pattern)):
                    shutil.copy2(path, target / path.name)


setup(cmdclass={"build_py": BuildWithShippedFiles})
