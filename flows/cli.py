"""The command line `tinycats`: each command calls one function of the core and prints what it returns."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tinycats_core.errors import TinycatsError, report_error

app = typer.Typer(
    help="Check, measure and cost cat generators. A release is made by `make release`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ReleaseFolder = Annotated[Path, typer.Argument(help="a release folder")]


@app.callback()
def command() -> None:
    """Check, measure and cost cat generators. A release is made by `make release`."""


@app.command()
def verify(release: ReleaseFolder) -> None:
    """Check every file of a release against its release.json. Exit status 1 if one has changed."""
    from tinycats_core.release.manifest import inspect

    manifest, wrong = inspect(release)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        raise typer.Exit(1)
    print(f"{manifest['name']} {manifest['version']}: {len(manifest['files'])} files, all as they were made")


@app.command()
def bench(release: ReleaseFolder, device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto") -> None:
    """Measure how fast a release draws in each runtime on this machine, and print the figures as JSON."""
    from tinycats_core.release.inference import measure_release

    print(json.dumps(measure_release(release, device), indent=2, allow_nan=False))


@app.command()
def costs(
    preset: Annotated[str | None, typer.Option(help="one preset (default: all)")] = None,
    gpu: Annotated[str | None, typer.Option(help="train on this GPU of Modal, such as L4; H100:4 is four of them")] = None,
    overrides: Annotated[str, typer.Option(metavar="JSON", help='such as \'{"train": {"steps": 100}}\'')] = "{}",
) -> None:
    """Print what a training of each preset takes: images/s, hours and dollars, and what the estimate rests on."""
    from tinycats_core.compute.costs import cost_table
    from tinycats_core.presets import parse_overrides

    rows = cost_table(preset, gpu, parse_overrides(overrides))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def prune(
    keep: Annotated[int, typer.Option(help="how many of the newest runs stay")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be deleted")] = False,
) -> None:
    """Delete all but the newest runs from the outputs volume on Modal."""
    from tinycats_core.compute.volumes import prune

    print("\n".join(prune(keep, dry_run)) or "no runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 after an error, 2 after wrong arguments."""
    try:
        app(args=arguments, prog_name="tinycats")
    except TinycatsError as error:
        return report_error(error)
    except SystemExit as ended:  # how typer ends every command
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
