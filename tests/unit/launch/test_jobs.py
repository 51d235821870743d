"""Rendering, exit statuses and the recipe's jobs, without a Slurm (tests/slurm has one)."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megatron_medllm.config.cluster import ClusterConfig, format_slurm_time, parse_slurm_time
from megatron_medllm.config.model import SIZES
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError
from megatron_medllm.launch import node, supervisor
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.launch.node import exit_status, node_problem, rendezvous_port
from megatron_medllm.launch.recipe_jobs import bench_job, recipe_jobs, submit_bench, submit_recipe
from megatron_medllm.launch.render import SCRIPTS, render_script, signal_lead_s, time_limit_s
from megatron_medllm.launch.status import (
    STATUS_COLUMNS,
    cancel,
    is_active,
    last_metrics,
    last_save_time_s,
    run_status,
    stage_status,
    status_report,
)
from megatron_medllm.launch.submit import check_chain, freeze, submission_report, submit
from megatron_medllm.processes import ProcessId
from megatron_medllm.recipe.stages import recipe_stages
from megatron_medllm.storage import read_json, write_json
from megatron_medllm.train.signals import allotted_s
from tests.worlds.model_dir import write_config

EXAMPLES = Path(__file__).parents[3] / "examples"
GOLDEN = Path(__file__).parents[2] / "golden" / "submit-cpt-72b.sbatch"
RECIPE = """
name: cpt72
run_dir: /lustre/runs/cpt72
model: {size: 72b}
layout: {nodes: 8, gpus_per_node: 8, tp: 8, pp: 4, sp: true}
cpt:
  data: [{path: /lustre/corpus}]
  train_tokens: 10_000_000_000
  sequence_length: 4096
  global_batch_size: 256
  optimizer: {lr: 1.0e-5}
cluster: {max_time: "24:00:00", cpus_per_process: 12, exclude: [h100-013]}
"""


HOUR = 3600
TIMES = {
    "90": 90 * 60,
    "90:30": 90 * 60 + 30,
    "12:00:00": 12 * HOUR,
    "00:90:00": 90 * 60,
    "2-3": 51 * HOUR,
    "2-03:04": 51 * HOUR + 4 * 60,
    "2-03:04:05": 51 * HOUR + 4 * 60 + 5,
}


@pytest.mark.parametrize("text", TIMES)
def test_slurm_times_in_every_form_of_sbatch(text: str, recipe: Path) -> None:
    """By itself, unquoted in YAML (which makes 12:00:00 the number 43200), quoted, and as an override."""
    assert parse_slurm_time(text) == TIMES[text]
    recipe.write_text(RECIPE.replace('max_time: "24:00:00"', f"max_time: {text}"))
    unquoted = load(recipe, []).cluster
    recipe.write_text(RECIPE.replace('max_time: "24:00:00"', f"max_time: '{text}'"))
    quoted = load(recipe, []).cluster
    overridden = load(recipe, [f"cluster.max_time={text}"]).cluster
    for cluster in (unquoted, quoted, overridden):
        assert cluster is not None
        assert time_limit_s(StageJob(name="cpt", script="cpt", command=()), cluster) == TIMES[text]


@pytest.mark.parametrize(
    "text",
    ["90 minutes", "0", "0:00", "UNLIMITED", "INFINITE", "-1", "1-", "1:2:3:4", "1-2:3:4:5", "12h", "1.5", "true"],
)
def test_what_sbatch_takes_for_no_limit_or_not_at_all_is_refused(text: str, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace('max_time: "24:00:00"', f"max_time: {text}"))
    with pytest.raises(UserError, match=r"recipe.yaml: cluster.max_time: ") as caught:
        load(recipe, [])
    assert "\n" not in str(caught.value)


def test_times_are_written_as_clocks() -> None:
    assert [format_slurm_time(s) for s in (1, 1800, 1801, 90000)] == ["00:01:00", "00:30:00", "00:31:00", "1-01:00:00"]


@pytest.mark.parametrize(("text", "seconds"), [("12:00:00", 12 * HOUR), ("1:30", 90), ("1-0", 24 * HOUR), ("90", 90)])
def test_a_stage_s_own_time_may_be_a_clock(text: str, seconds: float, recipe: Path, monkeypatch) -> None:
    run = load(recipe, [f"cpt.guard.walltime_s={text}"])
    assert run.cpt is not None and run.cpt.guard.walltime_s == seconds
    monkeypatch.setenv("MEDLLM_WALLTIME_S", text)
    assert allotted_s() == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "1:2:3:4"])
def test_a_wrong_time_in_the_environment_is_one_line(text: str, monkeypatch) -> None:
    monkeypatch.setenv("MEDLLM_WALLTIME_S", text)
    with pytest.raises(UserError, match=r"MEDLLM_WALLTIME_S=.*: expected seconds, or a time such as 12:00:00"):
        allotted_s()


def test_the_frozen_recipe_keeps_its_times(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace('max_time: "24:00:00"', "max_time: 12:00:00"))
    run = load(recipe, [])
    recipe.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load(recipe, []) == run


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([0, 0], 0),
        ([85, 0], 85),
        ([85, -signal.SIGTERM], 85),  # told to end while another rank had already saved
        ([85, 1], 1),
        ([1, 2, -signal.SIGTERM], 2),  # one rank refused its input, another lost its peer: another start mends nothing
        ([-signal.SIGKILL], 137),
        ([-signal.SIGUSR1], 85),  # it did not listen, or not yet: another start goes on from what is on disk
        ([-signal.SIGUSR1, -signal.SIGTERM], 85),
        ([-signal.SIGUSR1, 1], 1),
        ([-signal.SIGTERM], 143),  # interrupted before it could save: not a request to run again
    ],
)
def test_a_node_asks_to_run_again_only_if_all_its_ranks_do(codes: list[int], status: int) -> None:
    assert exit_status(codes) == status


def test_the_lead_of_the_signal_grows_with_the_save_and_must_fit_the_time() -> None:
    assert signal_lead_s(60.0) == 210
    job = StageJob(name="cpt", script="cpt", command=("-c", ""), save_time_s=60.0, duration_s=3600.0)
    assert time_limit_s(job, ClusterConfig()) == 1.3 * 3600 + 420
    assert time_limit_s(job, ClusterConfig(max_time="01:00:00")) == 3600
    with pytest.raises(UserError, match=r"cluster.max_time=00:05:00 is too short for cpt"):
        time_limit_s(job, ClusterConfig(max_time="00:05:00"))


@pytest.mark.parametrize("name", ["a run", "50%", "%j", "a#b", "実験 1", "[red]x"])
def test_a_run_directory_is_named_so_that_sbatch_reads_it_back(name: str, tmp_path: Path) -> None:
    job = StageJob(name="cpt", script="cpt", command=("-c", ""))
    scripts = submit(tmp_path / name, [job], ClusterConfig(), config_text="{}", dry_run=True).scripts
    options = [line.removeprefix("#SBATCH ") for line in scripts["cpt"].splitlines() if line.startswith("#SBATCH")]
    found = dict(option.split("=", 1) for option in options if "=" in option)
    # sbatch takes what stands in double quotes as it is, and puts the job's id for %j, but not for %%j.
    output = str(tmp_path / name / "launch" / "logs" / "cpt").replace("%", "%%") + "/%j.out"
    assert found["--output"] == (output if name in ("50%", "%j", "[red]x") else f'"{output}"')
    assert found["--job-name"].strip('"') == f"medllm-cpt-{name}"
    assert found["--job-name"].startswith('"') == (" " in name or "#" in name)


@pytest.mark.parametrize("name", ["a:b", 'a"b', "it's", "a\\b", "a\nb", "a\tb"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_directory_that_no_batch_script_can_name_is_refused(name: str, dry_run: bool, tmp_path: Path) -> None:
    job = StageJob(name="cpt", script="cpt", command=("-c", ""))
    with pytest.raises(UserError, match=r"run_dir: batch scripts cannot name .*; choose another directory") as caught:
        submit(tmp_path / name, [job], ClusterConfig(), config_text="{}", dry_run=dry_run)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / name).exists()


ALIVE = [
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"),
    *("RESIZING", "STOPPED", "SIGNALING", "STAGE_OUT", "RESV_DEL_HOLD", "SPECIAL_EXIT", "POWER_UP_NODE", "EXPEDITING"),
    "a state of tomorrow",
]
ENDED = [
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
    ),
    *("TIMEOUT", "CANCELLED by 1000", "CANCELLED+", "failed", ""),
]


@pytest.mark.parametrize(("state", "alive"), [*((s, True) for s in ALIVE), *((s, False) for s in ENDED)])
def test_over_is_what_slurm_calls_over(state: str, alive: bool) -> None:
    assert is_active(state) == alive


def test_a_resizing_job_is_neither_submitted_again_nor_passed_over_by_cancel(tmp_path: Path, monkeypatch) -> None:
    files = RunFiles(tmp_path / "run")
    write_json(files.submission, {"jobs": {"cpt": "7"}})
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"squeue": "echo '7|7|RESIZING|None'", "scancel": f"echo $@ > {tmp_path}/cancelled"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    with pytest.raises(UserError, match=r"jobs of this run are still queued \(7\)"):
        submit(files.run, [StageJob(name="cpt", script="cpt", command=())], ClusterConfig(), config_text="{}")
    assert cancel(files.run) == ["7"]
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_every_script_renders_and_keeps_its_commands() -> None:
    for path in SCRIPTS.glob("*.sbatch"):
        text = render_script(path.stem, ["--nodes=3"])
        commands = [line for line in path.read_text().splitlines() if not line.startswith("#SBATCH")]
        assert [line for line in text.splitlines() if line != "#SBATCH --nodes=3"] == commands
        assert text.startswith("#!") and text.index("--nodes=3") < text.index('"$1/launch/')
    with pytest.raises(UserError, match="no such batch script"):
        render_script("nowhere", [])


def test_chains_wait_only_for_what_comes_before() -> None:
    job = StageJob(name="rpo", script="rpo", command=("-c", ""), after=("cpt",))
    with pytest.raises(UserError, match="rpo waits for cpt"):
        check_chain([job])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_dry_run_of_a_72b_recipe_is_the_golden_script(recipe: Path, tmp_path: Path) -> None:
    run = load(recipe, ["model.size=null", "model.path=" + str(write_config(tmp_path, SIZES["72b"]))])
    assert run.cluster is not None
    jobs = recipe_jobs(run, recipe_stages(run, Path("/lustre/runs/cpt72/launch/config.yaml")), run.cluster)
    found = submit(run.run_dir, jobs, run.cluster, config_text="{}", dry_run=True)
    assert list(found.scripts) == ["cpt", "export"] and not found.job_ids
    assert found.scripts["cpt"] == GOLDEN.read_text()
    assert "cpt.sbatch" in submission_report(found)
    assert not run.run_dir.exists()
    assert jobs[0].total_steps == 9537  # 10e9 tokens in steps of 256 x 4096


def test_a_recipe_that_cannot_fit_is_refused_unless_forced(recipe: Path, tmp_path: Path) -> None:
    overrides = ["model.size=null", "model.path=" + str(write_config(tmp_path, SIZES["72b"]))]
    run = load(recipe, [*overrides, "layout.tp=2", "layout.pp=1", "layout.sp=false"])
    stages = recipe_stages(run, Path("config.yaml"))
    assert run.cluster is not None
    with pytest.raises(UserError, match=r"needs .* GiB per GPU, h100-sxm has"):
        recipe_jobs(run, stages, run.cluster)
    assert recipe_jobs(run, stages, run.cluster, force=True)[0].nodes == 8
    with pytest.raises(UserError, match="unknown stage 'ctp'; this recipe has cpt"):
        recipe_jobs(run, stages, run.cluster, only=["ctp"])


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_renders(example: Path, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "data=inputs"]
    size = re.search(r"qwen2\.5-([\d.]+b)|(qwen3-[\d.]+b)", example.name)
    if size is not None:
        overrides += [f"model.path={write_config(tmp_path, SIZES[size[1] or size[2]])}", "model.size=null"]
    run = load(example, overrides)
    printed = submit_recipe(run, stages=None, dry_run=True, force=False)
    scripts = printed.split("# ---- ")[1:]
    assert [text.split(".sbatch")[0] for text in scripts] == [s.name for s in recipe_stages(run, Path("config.yaml"))]
    assert all("launch/stage.sh" in text and "#SBATCH --time=" in text for text in scripts)
    assert not (tmp_path / "run").exists()


def test_a_benchmark_is_a_job_on_the_recipes_layout(recipe: Path, tmp_path: Path) -> None:
    run = load(recipe, [f"run_dir={tmp_path / 'run'}"])
    printed = submit_bench(run, "throughput --synthetic --steps 20", dry_run=True, force=False)
    assert "# ---- bench-throughput.sbatch ----" in printed and "#SBATCH --nodes=8\n" in printed
    assert run.cluster is not None
    job = bench_job(run, ["throughput", "--synthetic"], run.cluster, config=Path("/c.yaml"))
    assert job.command == ("-m", "megatron_medllm", "bench", "throughput", "/c.yaml", "--synthetic")
    assert (job.nodes, job.gpus_per_node, job.processes_per_node) == (8, 8, 8)
    one = bench_job(run, ["generation"], run.cluster, config=Path("/c.yaml"))
    assert (one.nodes, one.gpus_per_node, one.processes_per_node) == (1, 1, 0)
    with pytest.raises(UserError, match="'latency': expected one of throughput, scoring, generation"):
        submit_bench(run, "latency", dry_run=True, force=False)
    cramped = load(recipe, ["layout.tp=2", "layout.pp=1", "layout.sp=false"])
    with pytest.raises(UserError, match="GiB per GPU"):
        submit_bench(cramped, "throughput", dry_run=True, force=False)


def test_site_settings_name_the_container_only_where_there_is_one() -> None:
    command = 'set -u; source "$1"; printf "%s\n" "${MEDLLM_SRUN[@]}"'
    rendered = ["bash", "-c", command, "env", str(SCRIPTS / "env.sh")]

    def options(**variables: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", **variables}
        return subprocess.run(rendered, env=environment, capture_output=True, text=True, check=True).stdout.split()

    waiting = ["--kill-on-bad-exit=0", "--wait=120"]
    assert options() == waiting
    assert options(MEDLLM_CONTAINER_IMAGE="/i.sqsh", MEDLLM_CONTAINER_MOUNTS="/l:/l", SLURM_CPUS_PER_TASK="12") == [
        *waiting,
        "--cpus-per-task=12",
        "--container-image=/i.sqsh",
        "--container-mounts=/l:/l",
    ]


def test_every_start_of_a_job_meets_at_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that something else holds must not stop a job for good; two ports a start."""
    monkeypatch.setenv("SLURM_JOB_ID", "4999")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    ports = [rendezvous_port()]
    for restart in ("1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        ports.append(rendezvous_port())
    assert ports == [29998, 22024, 24050]


def test_a_node_without_disk_or_gpus_is_unfit(tmp_path: Path) -> None:
    spec = {"gpus_per_node": 0, "check_gpus": True, "min_free_disk_gib": 0}
    assert node_problem(tmp_path, spec) is None
    assert "needed" in (node_problem(tmp_path, {**spec, "min_free_disk_gib": 1e9}) or "")


@pytest.mark.parametrize(("gpus", "problem"), [(2, None), (1, "1 usable GPUs, 2 expected"), (0, "0 usable GPUs")])
def test_a_node_must_have_the_gpus_that_the_job_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, problem: str | None
) -> None:
    driver = tmp_path / "nvidia-smi"  # says so many GPUs
    driver.write_text("#!/bin/sh\n" + "".join(f"echo GPU {n}\n" for n in range(gpus)))
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    spec = {"gpus_per_node": 2, "check_gpus": True, "min_free_disk_gib": 0}
    found = node_problem(tmp_path, spec)
    assert found is None if problem is None else problem in (found or "")
    assert node_problem(tmp_path, {**spec, "check_gpus": False}) is None


def test_a_node_leaves_its_exit_status_and_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(tmp_path)
    command = "import os, sys; open(os.environ['MEDLLM_PROGRESS_FILE'], 'x').close(); sys.exit(2)"
    job = StageJob(name="pairs", script="eval", command=("-c", command))
    write_specification(files, job, {"check_gpus": False, "min_free_disk_gib": 0})
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NODEID": "1"}.items():
        monkeypatch.setenv(name, value)
    files.progress("pairs.3").write_text("an earlier start's")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        assert node.main(tmp_path, "pairs") == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert files.progress("pairs.3").read_text() == ""
    assert read_json(files.launch / "logs" / "pairs.3" / "job7-restart0" / "node1" / "exit-status.json") == 2


def test_all_nodes_learn_of_an_unfit_one_and_fit_ones_wait_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, spec = RunFiles(tmp_path), {"nodes": 2}
    monkeypatch.setenv("SLURM_JOB_NODELIST", "")
    monkeypatch.setattr(node, "allocated_nodes", lambda: ["n1", "n2"])
    monkeypatch.setattr(node, "CHECK_IN_TIMEOUT_S", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert node.check_in(files, "cpt", spec, None) == {"n2": "did not check in within 0.2 s"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # another start: the first one's files do not count
    folder = tmp_path / "launch" / "check-in" / "cpt" / "job0-restart1"
    write_json(folder / "n2.json", {"problem": "no disk"})
    assert node.check_in(files, "cpt", spec, None) == {"n2": "no disk"}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_json(folder.with_name("job0-restart2") / "n2.json", {"problem": None})
    assert node.check_in(files, "cpt", spec, None) == {}


def test_the_supervisor_runs_on_a_bare_python(tmp_path: Path) -> None:
    """It imports nothing of the package: the batch script calls it outside any container."""
    command = [sys.executable, "-I", "-S", supervisor.__file__, "begin", str(tmp_path), "cpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "FileNotFoundError" in done.stderr and "cpt.json" in done.stderr


def test_metrics_are_read_from_their_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) == {}
    row = '{"step": %d, "step_time_s": 0.5, "tokens_per_s": 10.0}\n'
    text = "".join(row % n for n in range(5000)) + '{"step": 5000, "save_s": 12.5}\n{"step": 5001, "st'
    path.write_text(text)
    assert last_metrics(path)["step"] == 4999
    assert last_save_time_s(path) == 12.5


def test_status_of_a_run_that_was_never_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not submitted"):
        run_status(tmp_path)
    assert status_report([]).split() == list(STATUS_COLUMNS)
    assert RunFiles(tmp_path).script("cpt") == tmp_path / "launch" / "cpt.sbatch"


def test_the_status_of_a_running_training_counts_its_own_steps(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    job = StageJob(name="rpo", script="rpo", command=("-c", "pass"), metrics="rpo/metrics.jsonl", total_steps=90)
    write_specification(files, job, {})
    (tmp_path / "rpo").mkdir()
    (tmp_path / "rpo" / "metrics.jsonl").write_text('{"step": 30, "step_time_s": 2.0, "tokens_per_s": 10.0}\n')
    planned = stage_status(files, "rpo", "7", ("RUNNING", "None"))
    assert (planned.total_steps, planned.eta_s, planned.reason) == (90, 120.0, "")
    write_json(tmp_path / "rpo" / "progress.json", {"total_steps": 75})  # what the pairs came to
    counted = stage_status(files, "rpo", "7", ("RUNNING", "None"))
    assert (counted.total_steps, counted.eta_s) == (75, 90.0)
    assert status_report([counted]).splitlines()[1].split() == [
        *("rpo", "7", "running", "30/75", "-", "10", "0:01:30", "-", "0")
    ]


def test_a_submission_freezes_the_body_of_its_scripts(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    freeze(files, [StageJob(name="cpt", script="cpt", command=("-c", ""))], ClusterConfig(), "name: x\n")
    body = (tmp_path / "launch" / "stage.sh").read_text()
    assert body == (SCRIPTS / "stage.sh").read_text() and 'srun "${MEDLLM_SRUN[@]}"' in body


def test_a_node_ends_the_ranks_that_this_starts_verdict_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process too, after it has written its stack."""
    monkeypatch.setattr(node, "STACK_WAIT_S", 1.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stack = tmp_path / "stack.txt"
    code = (
        f"import faulthandler, signal, time; stack = open({str(stack)!r}, 'w')\n"
        "faulthandler.register(signal.SIGUSR2, file=stack); print('ready', flush=True); time.sleep(3600)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline()
    rank.send_signal(signal.SIGSTOP)
    row = {"kind": "silent", "ranks": [asdict(ProcessId.of(rank.pid))], "job_id": "7"}
    verdict = tmp_path / "stall.json"
    write_json(verdict, {**row, "restart": 0})  # an earlier start's
    ending = threading.Thread(target=node.end_stalled_ranks, args=(verdict,), daemon=True)
    ending.start()
    time.sleep(2 * node.CHECK_IN_POLL_S)
    assert rank.poll() is None
    write_json(verdict, {**row, "restart": 1})
    assert rank.wait(timeout=60) == -signal.SIGKILL
    assert "line 2" in stack.read_text()
    ending.join(timeout=60)


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        ("{kind: transformers}", 1),
        ("{kind: vllm, python: /venv/bin/python, tensor_parallel: 4}", 4),
        ("{kind: openai, url: 'http://n1:8000/v1'}", 0),
    ],
)
def test_an_exam_asks_for_the_gpus_of_its_engine(recipe: Path, tmp_path: Path, engine: str, gpus: int) -> None:
    recipe.write_text(RECIPE + f"eval: {{exam: {{data: [/lustre/exam]}}, engine: {engine}}}\n")
    run = load(recipe, ["model.size=null", "model.path=" + str(write_config(tmp_path, SIZES["72b"]))])
    assert run.cluster is not None
    jobs = {job.name: job for job in recipe_jobs(run, recipe_stages(run, Path("c.yaml")), run.cluster)}
    assert [jobs[name].gpus_per_node for name in ("eval-base", "cpt", "eval-cpt")] == [gpus, 8, gpus]
    assert (jobs["eval-cpt"].after, jobs["eval-cpt"].processes_per_node) == (("cpt",), 0)
