"""What the recipe's section `cluster` makes of a job: sbatch's options, the container's, the end of the chain."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.run import load
from megatron_medllm.launch import on_end
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.launch.recipe_jobs import recipe_jobs
from megatron_medllm.launch.render import SCRIPTS
from megatron_medllm.launch.submit import freeze, queue, submission_report, submit
from megatron_medllm.recipe.stages import recipe_stages
from megatron_medllm.storage import write_json

LAPTOP = Path(__file__).parents[3] / "examples" / "laptop.yaml"
JOBS = [
    StageJob(name="cpt", script="cpt", command=("-c", "")),
    StageJob(name="export", script="export", command=("-c", ""), after=("cpt",)),
]


def scripts(run: Path, **settings: object) -> dict[str, str]:
    return submit(run, JOBS, ClusterConfig(**settings), config_text="{}", dry_run=True).scripts


def test_account_to_memory_are_options_of_every_job(tmp_path: Path) -> None:
    settings = {"account": "medllm", "partition": "h100,h200", "qos": "long", "reservation": "night", "memory": "500G"}
    for text in scripts(tmp_path, **settings, constraint="h100&ib", exclusive=True).values():
        options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
        first = options.index("--account=medllm")
        assert options[first : first + 7] == [
            *("--account=medllm", "--partition=h100,h200", "--qos=long", "--reservation=night"),
            *("--constraint=h100&ib", "--exclusive", "--mem=500G"),
        ]
    assert not any("--mem" in text or "--exclusive" in text for text in scripts(tmp_path).values())


@pytest.mark.parametrize(
    ("settings", "extra", "why"),
    [
        ({}, ["--time=1"], "medllm submit sets it"),
        ({}, ["-t 1"], "medllm submit sets it"),
        ({}, ["-N4"], "medllm submit sets it"),
        ({"partition": "gpu"}, ["-p", "x"], "cluster.partition sets it"),
        ({"partition": "gpu"}, ["--partition x"], "cluster.partition sets it"),
        ({"memory": "0"}, ["--mem=5G"], "cluster.memory sets it"),
        ({"exclude": ["n1"]}, ["-x n2"], "cluster.exclude sets it"),
        ({"mail_user": "a@b"}, ["--mail-type=ALL"], "cluster.mail_user sets it"),
        ({}, ["--comment=a", "--comment=b"], "it is there twice"),
        ({}, ["comment=a"], "is not an option of sbatch"),
    ],
)
def test_an_option_is_never_given_twice(settings: dict, extra: list[str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ClusterConfig(**settings, extra_options=extra)


def test_options_of_other_names_pass() -> None:
    extra = ("--reservation=x", "-p gpu", "--mem-per-cpu=4G", "--exclusive", "--time-min=10")
    assert ClusterConfig(memory="5G", extra_options=extra).extra_options == extra


@pytest.mark.parametrize("setting", ["account", "partition", "constraint", "mail_user", "memory"])
def test_what_sbatch_would_misread_is_refused(setting: str) -> None:
    with pytest.raises(ValidationError, match=setting):
        ClusterConfig(**{setting: "two words"})
    with pytest.raises(ValidationError, match="need container_image"):
        ClusterConfig(container_mounts=["/a:/a"])


def test_the_recipe_wins_over_the_site_and_leaves_it_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To sbatch, a variable of its environment would win over the script."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "${SBATCH_ACCOUNT-unset} ${SBATCH_QOS-unset}"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    site = tmp_path / "env.sh"
    site.write_text("export SBATCH_ACCOUNT=site SBATCH_QOS=site\n")
    files, cluster = RunFiles(tmp_path / "run"), ClusterConfig(account="mine", env_file=site)
    freeze(files, JOBS, cluster, "{}")
    assert queue(files, "cpt", cluster) == "unset site"
    assert queue(files, "cpt", ClusterConfig()) == "site site"


def test_the_recipes_container_takes_the_place_of_the_sites(tmp_path: Path) -> None:
    site = tmp_path / "env.sh"
    site.write_text("MEDLLM_CONTAINER_IMAGE=old MEDLLM_CONTAINER_MOUNTS=/old\n" + (SCRIPTS / "env.sh").read_text())
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3").write_text("#!/bin/sh\nexit 0\n")
    (bare / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    for program in bare.iterdir():
        program.chmod(0o755)

    def srun_options(**settings: object) -> list[str]:
        files = RunFiles(tmp_path / "run")
        freeze(files, JOBS, ClusterConfig(env_file=site, **settings), "{}")
        script = f'set -- "{files.run}" cpt; source "$1/launch/stage.sh"'
        environment = {"PATH": f"{bare}:{os.environ['PATH']}", "HOME": "/root"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
        return [line for line in done.stdout.splitlines() if line.startswith("--")]

    waiting = ["--kill-on-bad-exit=0", "--wait=120"]
    assert srun_options() == [*waiting, "--container-image=old", "--container-mounts=/old"]
    given = {"container_image": "a b.sqsh", "container_mounts": ["/x:/x", "/y"], "container_workdir": "/x"}
    expected = ["--container-image=a b.sqsh", "--container-mounts=/x:/x,/y", "--container-workdir=/x"]
    assert srun_options(**given) == [*waiting, *expected]
    found = submit(tmp_path / "run", JOBS, ClusterConfig(**given), config_text="{}", dry_run=True)
    assert submission_report(found).splitlines()[0] == "# srun also gets: " + " ".join(expected)


def test_the_end_is_told_behind_all_jobs_and_mailed_of_the_last(tmp_path: Path) -> None:
    found = scripts(tmp_path, on_end="notify", mail_user="a@b")
    assert list(found) == ["cpt", "export", "on-end"]
    assert "#SBATCH --dependency=afterany:<cpt>:<export>\n" in found["on-end"]
    assert "#SBATCH --mail-type=FAIL\n" in found["cpt"] and "#SBATCH --mail-type=END,FAIL\n" in found["export"]
    assert list(scripts(tmp_path)) == ["cpt", "export"]


@pytest.mark.parametrize(
    ("endings", "told"),
    [
        ({"cpt": "finished", "export": "finished"}, ["finished", "", ""]),
        ({"cpt": "failed"}, ["failed", "cpt", "why cpt"]),
        ({"cpt": "finished"}, ["failed", "export", "Slurm ended it without a word"]),
        ({"cpt": "requeued"}, ["failed", "cpt", "Slurm ended it; before that: why cpt"]),
    ],
)
def test_the_command_at_the_end_gets_the_verdict(tmp_path: Path, endings: dict[str, str], told: list[str]) -> None:
    files, seen = RunFiles(tmp_path / "a run"), tmp_path / "seen"
    command = f'printf "%s|" "$@" "$MEDLLM_VERDICT" "$MEDLLM_STAGE" >{seen}; exit 4'
    after = StageJob(name="on-end", script="end", command=(command,), after=("cpt", "export"))
    for job in (*JOBS, after):
        write_specification(files, job, {})
    for stage, outcome in endings.items():
        write_json(files.ended(stage), {"outcome": outcome, "reason": f"why {stage}"})
    bare = [sys.executable, "-I", "-S", on_end.__file__, str(files.run), "on-end"]
    assert subprocess.run(bare, check=False).returncode == 4
    assert seen.read_text().split("|")[:-1] == [str(files.run), *told, *told[:2]]


def test_the_command_at_the_end_is_told_which_shard_failed(tmp_path: Path) -> None:
    files, seen = RunFiles(tmp_path), tmp_path / "seen"
    array = StageJob(name="pairs-shards", script="eval", command=(), array_size=3)
    command = f'printf "%s|" "$3" "$4" >{seen}'
    for job in (array, StageJob(name="on-end", script="end", command=(command,), after=("pairs-shards",))):
        write_specification(files, job, {})
    for task, outcome in enumerate(("finished", "failed", "finished")):
        write_json(files.ended(files.task("pairs-shards", task)), {"outcome": outcome, "reason": f"why {task}"})
    assert on_end.main(tmp_path, "on-end") == 0
    assert seen.read_text() == "pairs-shards|shard 2/3: why 1|"


def test_what_follows_an_exam_with_requirements_waits_for_it(tmp_path: Path) -> None:
    def waits(*overrides: str) -> dict[str, set[str]]:
        run = load(LAPTOP, [f"run_dir={tmp_path}", *overrides])
        assert run.cluster is not None
        jobs = recipe_jobs(run, recipe_stages(run, Path("config.yaml")), run.cluster)
        assert all((job.exam is not None) == job.name.startswith("eval-") for job in jobs)
        return {job.name: {name for name in job.after if name.startswith("eval-")} for job in jobs}

    free, gated = waits("eval.require=[]"), waits("eval.require=[accuracy >= 0.1]")
    assert not any(exams for name, exams in free.items() if name != "report")
    assert free["eval-cpt"] == gated["eval-cpt"] == set()
    assert "eval-cpt" in gated["rpo"] and "eval-base" in gated["cpt"] and "eval-cpt" not in gated["cpt"]


def test_a_new_submission_forgets_how_the_last_one_ended(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    jobs = [*JOBS, StageJob(name="pairs", script="eval", command=("-c", ""), array_size=2)]
    for name in ("cpt", "pairs.1", "rpo"):
        write_json(files.ended(name), {"outcome": "failed"})
        files.progress(name).touch()
    freeze(files, jobs, ClusterConfig(), "{}")
    assert {path.name for path in files.launch.glob("*.ended.json")} == {"rpo.ended.json"}
    assert {path.name for path in files.launch.glob("*.progress")} == {"rpo.progress"}
