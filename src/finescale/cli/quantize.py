"""``finescale quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli import options
from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def quantize(
    model: options.Model,
    recipe: Annotated[str, typer.Option(help="A recipe's name (see finescale recipes) or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Output folder; an unfinished run there goes on.")],
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    length: options.Length = None,
    set_: options.Settings = None,
    target_bits: options.TargetBits = None,
    max_kl: options.MaxKl = None,
    choices: options.Choices = None,
    sensitivity: options.Sensitivity = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="compressed-tensors, gptq, gptq_v2, awq, dense.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: options.Seed = 0,
    tp: Annotated[int, typer.Option(help="Check that layers can be cut over this many ranks.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept under 80 % of the block weights.")
    ] = False,
    allow_unknown_family: Annotated[
        bool, typer.Option("--allow-unknown-family", help="Read an unknown model's blocks from its module graph.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bytes for any number of processes (torchrun).")
    ] = False,
    spill: Annotated[bool, typer.Option("--spill", help="Keep activations on disk, not in memory.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
) -> None:
    """Quantize a model into a folder that transformers, vLLM and finescale load."""
    quiet_libraries()
    from finescale.api import write_report
    from finescale.cli.mix import mixed_recipe
    from finescale.environment import launch
    from finescale.errors import InputError
    from finescale.pipeline.quantize import prepare, run
    from finescale.ranks import leave
    from finescale.recipe import Recipe
    from finescale.report import summary_table, units

    chosen = Recipe.load(recipe, options.settings_of(set_, samples, length, format_))
    if target_bits is not None or max_kl is not None:
        if launch().count > 1:
            raise InputError("bits are chosen in one process; run finescale mix first and give its recipe to torchrun.")
        place = options.sensitivity_file(sensitivity, out)
        chosen, _ = mixed_recipe(model, chosen, place, target_bits, max_kl, choices, calibration, seed, device)
    elif choices is not None or sensitivity is not None:
        raise InputError("--choices and --sensitivity belong to --target-bits or --max-kl; give one of them.")
    job = prepare(
        model, chosen, out, calibration, seed, device, tp, allow_partial, allow_unknown_family,
        deterministic, spill,
    )  # fmt: skip
    if not job.ranks.leads:  # the first process speaks for all
        if not dry_run:
            run(job, fresh)
        leave()
        return
    facts = job.calibration.facts()
    console.print(
        f"{len(job.plan.layers)} layers of {job.skeleton.block_count} blocks, "
        f"{job.plan.share:.1%} of the block weights; "
        f"calibration {facts['samples']} x {facts['length']} tokens of {facts['source']}; "
        f"needs about {units.size(job.memory_bytes)} of memory and {units.size(job.output_bytes)} of disk."
        + (f" {job.ranks.count} processes." if job.ranks.count > 1 else "")
    )
    for note in job.notes:
        console.print(f"[yellow]note:[/] {note}")
    if dry_run:
        return
    with progress_bar("blocks") as update:
        report = run(job, fresh, update)
    leave()
    if report.pop("already_complete", False):
        console.print(f"{out} already holds this result; use --fresh to make it again.")
    page = write_report(out, report)
    from finescale.formats.source import read_json

    console.print(summary_table(report, read_json(out / "run.json", "")))
    console.print(f"checkpoint: {out}\nreport:     {page}")
    write_json_file(json_, report)
