"""The recipe's container on a real Slurm, pyxis played by a plugin of our own (stand_in_pyxis.c)."""

import shutil
import subprocess
from pathlib import Path

import pytest
from local_slurm import LocalSlurm

from megatron_medllm.launch.jobs import StageJob
from megatron_medllm.storage import read_json

SOURCE = Path(__file__).with_name("stand_in_pyxis.c")
lacking = [
    *([] if shutil.which("gcc") else ["gcc"]),
    *([] if Path("/usr/include/slurm/spank.h").is_file() else ["slurm/spank.h (apt-get install libslurm-dev)"]),
]


@pytest.mark.skipif(bool(lacking), reason=f"the stand-in for pyxis needs {' and '.join(lacking)}")
def test_srun_gets_the_recipes_container_and_not_the_sites(slurm: LocalSlurm, tmp_path: Path) -> None:
    plugin, stack, seen = tmp_path / "stand_in_pyxis.so", slurm.directory / "plugstack.conf", tmp_path / "seen.json"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(plugin), str(SOURCE)], check=True)
    site = tmp_path / "env.sh"
    site.write_text("MEDLLM_CONTAINER_IMAGE=/site.sqsh\n" + slurm.environment_file.read_text())
    code = (
        "import json, os\n"
        f"values = {{k: v for k, v in os.environ.items() if k.startswith('PYXIS_')}}\n"
        f"json.dump(values, open({str(seen)!r}, 'w'))"
    )
    run = tmp_path / "run"
    stack.write_text(f"required {plugin}\n")
    try:
        ids = slurm.submit(
            run,
            [StageJob(name="corpus", script="corpus", command=("-c", code))],
            env_file=site,
            container_image="nvcr.io#nvidia/pytorch:26.05-py3",
            container_mounts=["/lustre:/lustre", "/data:/data:ro"],
            container_workdir="/lustre",
            account="medllm",
            exclusive=True,
            memory="1G",
            on_end=f'echo "$2 $3" >{tmp_path}/told',
        )
        slurm.wait_for_chain(run, ids)
    finally:
        stack.write_text("")
    assert list(ids) == ["corpus", "on-end"]
    assert (tmp_path / "told").read_text() == "finished \n"
    assert read_json(seen) == {
        "PYXIS_IMAGE": "nvcr.io#nvidia/pytorch:26.05-py3",
        "PYXIS_MOUNTS": "/lustre:/lustre,/data:/data:ro",
        "PYXIS_WORKDIR": "/lustre",
    }
