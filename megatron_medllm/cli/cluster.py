"""The commands around a run on a cluster: plan, submit, status, cancel, doctor."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_medllm.cli.options import Config, Overrides, console, load_recipe, print_text
from megatron_medllm.errors import UserError


def plan(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100-sxm, h200, a100-80g, a .json file; default: the cluster's")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="rank all layouts that fit")] = False,
    scale: Annotated[
        int | None, typer.Option(min=1, help="the same job on twice as many GPUs, again and again up to this many")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    html: Annotated[bool, typer.Option("--html", help="write RUN_DIR/plan-STAGE.html too")] = False,
) -> None:
    """Say what `stage` needs per GPU and what it will reach, before anything is submitted."""
    from megatron_medllm.pages.plan import write_plan_page
    from megatron_medllm.planner.from_config import workload_of
    from megatron_medllm.planner.plan import plan as make_plan
    from megatron_medllm.planner.report import plan_report, plan_values, scale_report, search_report
    from megatron_medllm.planner.scale import doublings, scaling_curve
    from megatron_medllm.planner.search import search as search_layouts

    run = load_recipe(config, overrides)
    workload = workload_of(run)
    hardware = hardware or (run.cluster.hardware if run.cluster else "h100-sxm")
    if search:
        report = search_report(search_layouts(workload, hardware))
        print_text(report)
        return
    if scale is not None:
        curve = scaling_curve(workload, hardware, gpus=doublings(workload, largest=scale))
        print_text(scale_report(curve))
        return
    found = make_plan(workload, hardware)
    if html:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        write_plan_page(run.run_dir / f"plan-{run.stage}.html", run.stage, plan_values(found))
    if as_json:
        console.print_json(data=plan_values(found))
        return
    print_text(plan_report(found))


def submit(
    config: Config,
    overrides: Overrides = None,
    stages: Annotated[str | None, typer.Option(help="comma-separated stages; default: the whole recipe")] = None,
    bench: Annotated[
        str | None, typer.Option(help="a benchmark instead of the recipe: what follows `medllm bench`")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, submit nothing")] = False,
    force: Annotated[bool, typer.Option("--force", help="submit although the plan does not fit")] = False,
    certify_first: Annotated[
        bool, typer.Option("--certify", help="prove the layout on this machine's CPUs first, where that is not done")
    ] = False,
) -> None:
    """Submit the recipe as a chain of Slurm jobs that checks, resumes and requeues itself."""
    from megatron_medllm.certify.stages import certificates, certify_stages
    from megatron_medllm.launch.recipe_jobs import submit_bench, submit_recipe

    run = load_recipe(config, overrides)
    if certify_first:
        certify_stages(run)
    if bench is None:
        print_text(certificates(run))
    if bench is not None:
        printed = submit_bench(run, bench, dry_run=dry_run, force=force)
    else:
        printed = submit_recipe(run, stages=stages.split(",") if stages else None, dry_run=dry_run, force=force)
    print_text(printed)


def certify(
    config: Config,
    overrides: Overrides = None,
    max_ranks: Annotated[int, typer.Option(min=1, help="processes to run at most; a larger layout is folded")] = 8,
    again: Annotated[bool, typer.Option("--again", help="although the run directory has a certificate")] = False,
    check: Annotated[bool, typer.Option("--check", help="only say whether the certificate there still holds")] = False,
) -> None:
    """Prove `stage`'s layout on CPUs: a small model in many processes against one. Exit status 1: it differs."""
    from megatron_medllm.certify.certificate import certificate_report, read_certificate

    run = load_recipe(config, overrides)
    found = read_certificate(run) if check else None
    if check and found is None:
        raise UserError(f"{run.run_dir}: no certificate for stage {run.stage}; run medllm certify")
    if found is None:
        from megatron_medllm.certify.run import certify as certify_run

        found, is_old = certify_run(run, max_ranks=max_ranks, again=again)
        if is_old:
            print_text(f"unchanged since {found.made}: {run.run_dir / 'certificate.json'}")
    print_text(certificate_report(found))
    raise typer.Exit(0 if found.passed else 1)


def status(
    run_dir: Annotated[Path, typer.Argument(help="a run's directory")],
    watch: Annotated[bool, typer.Option("--watch", help="show it live until it ends; Ctrl-C leaves it alone")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show every stage of a run. Exit status 0: finished; 3: running or queued; 1: failed or stopped."""
    from megatron_medllm.launch.live import find_status
    from megatron_medllm.launch.live import watch as watch_run

    found = watch_run(run_dir, Console(stderr=as_json)) if watch else find_status(run_dir)
    if as_json:
        console.print_json(data=found.to_json())
    elif not watch:
        print_text(found.report())
    raise typer.Exit(found.exit_status)


def cancel(run_dir: Annotated[Path, typer.Argument(help="a submitted run's directory")]) -> None:
    """Cancel the jobs of this run, and of this run only."""
    from megatron_medllm.launch.status import cancel as cancel_run

    print_text(f"cancelled: {', '.join(cancel_run(run_dir)) or 'nothing was queued'}")


def doctor() -> None:
    """Check the installation: what is missing, and which features need it."""
    from megatron_medllm.launch.doctor import doctor as examine
    from megatron_medllm.launch.doctor import doctor_report, failed

    checks = examine()
    print_text(doctor_report(checks))
    raise typer.Exit(1 if failed(checks) else 0)
