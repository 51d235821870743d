"""Exams and pair sampling as job arrays, without a Slurm (tests/slurm has one)."""

from pathlib import Path

import pytest

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.errors import UserError
from megatron_medllm.launch import node, supervisor
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.launch.recipe_jobs import recipe_jobs
from megatron_medllm.launch.status import stage_status
from megatron_medllm.launch.submit import submit
from megatron_medllm.recipe.records import recipe_parts
from megatron_medllm.recipe.stages import recipe_stages

GOLDEN = Path(__file__).parents[2] / "golden" / "submit-eval-72b-shards.sbatch"
CONFIG = Path("/lustre/runs/exam72/launch/config.yaml")
RECIPE = """
name: exam72
run_dir: /lustre/runs/exam72
model: {path: /lustre/Qwen2.5-72B}
eval:
  exam: {data: [/lustre/igakuqa]}
  engine: {kind: vllm, python: /opt/vllm/bin/python, tensor_parallel: 4, replicas: 4}
cluster: {max_time: "24:00:00"}
"""
PAIRS = """
rpo: {pairs: none, sequence_length: 512, global_batch_size: 4, optimizer: {lr: 1.0e-6}}
pairs:
  questions: {data: [/lustre/train]}
  contamination: allow
  engine: {kind: vllm, python: /opt/vllm/bin/python, tensor_parallel: 4, replicas: 3}
"""


def recipe(tmp_path: Path, *overrides: str, text: str = RECIPE) -> RunConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load(path, list(overrides))


def jobs_of(run: RunConfig) -> dict[str, StageJob]:
    assert run.cluster is not None
    return {job.name: job for job in recipe_jobs(run, recipe_stages(run, CONFIG), run.cluster, force=True)}


def test_a_dry_run_of_a_72b_exam_asks_for_four_gpus_in_four_tasks(tmp_path: Path) -> None:
    run = recipe(tmp_path)
    jobs = jobs_of(run)
    assert run.cluster is not None and list(jobs) == ["eval-base-shards", "eval-base", "report"]
    scripts = submit(run.run_dir, list(jobs.values()), run.cluster, config_text="{}", dry_run=True).scripts
    assert scripts["eval-base-shards"] == GOLDEN.read_text()
    assert {"#SBATCH --gpus-per-node=4", "#SBATCH --array=0-3"} <= set(GOLDEN.read_text().splitlines())
    assert "--dependency=afterok:<eval-base-shards>" in scripts["eval-base"]
    assert "--gpus" not in scripts["eval-base"] and "--array" not in scripts["eval-base"]
    array, merge = jobs["eval-base-shards"], jobs["eval-base"]
    assert "#SBATCH --time=00:" in scripts["eval-base"]  # it reads answers and loads no model
    assert merge.command == (*array.command, "--merge") and "--shard" not in array.command


def test_pairs_are_sampled_in_shards_before_they_are_scored(tmp_path: Path) -> None:
    jobs = jobs_of(recipe(tmp_path, "cluster.gpus=false", text=RECIPE + PAIRS))
    assert (jobs["pairs-shards"].array_size, jobs["pairs"].after, jobs["score"].after) == (
        3,
        ("pairs-shards",),
        ("pairs",),
    )
    assert jobs["pairs"].array_size is None and jobs["eval-rpo-shards"].after == ("rpo",)


@pytest.mark.parametrize(("override", "redone"), [("eval.engine.replicas=2", False), ("eval.engine.seed=2", True)])
def test_the_number_of_replicas_redoes_nothing(tmp_path: Path, override: str, redone: bool) -> None:
    keys = []
    for run in (recipe(tmp_path), recipe(tmp_path, override)):
        stages = recipe_stages(run, CONFIG)
        keys.append(recipe_parts(stages, run.model_dump(mode="json"), {stage.name: {} for stage in stages}))
    assert (keys[0] != keys[1]) is redone


def test_no_replicas_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.engine\.replicas") as caught:
        recipe(tmp_path, "eval.engine.replicas=0")
    assert "\n" not in str(caught.value)


def test_a_task_knows_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert node.shard_arguments({"array_size": 4}) == ["--shard", "3/4"]
    assert node.shard_arguments({"array_size": None}) == []
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert node.shard_arguments({"array_size": 4}) == []


def test_a_failed_shard_is_named_in_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(tmp_path)
    settings = {"max_restarts_without_progress": 1, "requeue_exit_code": 85, "unfit_node_exit_code": 86}
    write_specification(files, StageJob(name="eval", script="eval", command=(), array_size=3), settings)

    def run_array(array_id: str, codes: list[int]) -> None:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array_id)
        for task, code in enumerate(codes):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            monkeypatch.setenv("SLURM_JOB_ID", f"{array_id}{task}")
            assert supervisor.main(["begin", str(tmp_path), "eval"]) == 0
            assert supervisor.main(["end", str(tmp_path), "eval", str(code)]) == code

    run_array("7", [0, 2, 0])
    found = stage_status(files, "eval", "7", None)
    assert (found.state, found.step, found.total_steps) == ("failed", 2, 3)
    assert found.reason == "shard 2/3: the command failed with exit code 2"
    waiting = stage_status(files, "eval", "8", ("PENDING", "Priority"))  # submitted again
    assert (waiting.state, waiting.step, waiting.reason) == ("PENDING", 0, "Priority")
    run_array("8", [0, 0, 0])
    found = stage_status(files, "eval", "8", None)
    assert (found.state, found.step, found.restarts, found.reason) == ("finished", 3, 0, "")


def test_a_cluster_section_is_enough_to_ask_for_no_gpus(tmp_path: Path) -> None:
    run = recipe(tmp_path, "cluster.gpus=false")
    assert run.cluster == ClusterConfig(gpus=False) and jobs_of(run)["eval-base-shards"].gpus_per_node == 0


def test_answers_count_as_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exam that outlasts its time limit is started again as long as it gets on."""
    files, log = RunFiles(tmp_path), tmp_path / "eval" / "answers.1-of-2.jsonl"
    settings = {"max_restarts_without_progress": 1}
    write_specification(files, StageJob(name="eval", script="eval", command=(), answers="eval"), settings)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    log.parent.mkdir()
    for _ in range(3):
        with open(log, "a") as stream:
            stream.write("{}\n")
        assert supervisor.main(["begin", str(tmp_path), "eval"]) == 0
    assert supervisor.main(["begin", str(tmp_path), "eval"]) == 0
    assert supervisor.main(["begin", str(tmp_path), "eval"]) == supervisor.GIVE_UP_EXIT_CODE
    assert jobs_of(recipe(tmp_path))["eval-base-shards"].answers == "/lustre/runs/exam72/eval/base"


def test_parts_of_a_corpus_count_as_progress(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in ("000000.json", "000001.json", "000002.bin", "backend.json"):
        (tmp_path / "parts" / name).touch()
    spec = {"answers": None, "checkpoints": None, "parts": str(tmp_path / "parts")}
    assert supervisor.newest_step(tmp_path, spec) == 2


def test_a_corpus_is_an_array_and_a_last_job(tmp_path):
    corpora = """
corpora:
  medical: {sources: {a: {paths: /lustre/a.jsonl}}, tokenizer: /lustre/Qwen2.5-72B, eod_id: 151643}
"""
    run = recipe(tmp_path, "cluster.corpus_tasks=8", text=RECIPE + corpora)
    jobs = {job.name: job for job in recipe_jobs(run, recipe_stages(run, CONFIG), run.cluster)}
    array, last = jobs["corpus-medical-shards"], jobs["corpus-medical"]
    build = ("-m", "megatron_medllm", "corpus", "build", "--only", "medical", str(CONFIG))
    assert (array.command, array.array_size, array.after) == (build, 8, ())
    assert (last.command, last.array_size, last.after) == ((*build, "--finish"), None, ("corpus-medical-shards",))
    assert array.parts == last.parts == "/lustre/runs/exam72/corpus/medical/.work/parts"
    one = recipe(tmp_path, text=RECIPE + corpora)
    assert recipe_jobs(one, recipe_stages(one, CONFIG), one.cluster)[0].command == build
