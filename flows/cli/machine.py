"""Commands about this machine and what lies on it: runs, where, doctor; and what trainings cost: costs, prune."""

from typing import Annotated

import typer

from flows.cli.common import Json, Overrides, Set, app, chosen, print_json, print_table


@app.command()
def costs(
    preset: Annotated[str | None, typer.Option(help="one preset (default: all)")] = None,
    gpu: Annotated[str | None, typer.Option(help="train on this GPU of Modal, such as L4; H100:4 is four of them")] = None,
    sets: Set = None,
    overrides: Overrides = "{}",
    as_json: Json = False,
) -> None:
    """Print what a training of each preset takes: images/s, hours and dollars, and what the estimate rests on."""
    from tinycats_core.compute.costs import cost_table

    head, *rows = cost_table(preset, gpu, chosen(overrides, sets))
    if as_json:
        print_json([dict(zip(head, row, strict=True)) for row in rows])
    else:
        print_table([head, *rows])


@app.command()
def prune(
    keep: Annotated[int, typer.Option(help="how many of the newest runs stay")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be deleted")] = False,
) -> None:
    """Delete all but the newest runs from the outputs volume on Modal."""
    from tinycats_core.compute.volumes import prune

    print("\n".join(prune(keep, dry_run)) or "no runs")
