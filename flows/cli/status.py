"""Commands about this machine and what lies on it: runs, where, doctor; and what trainings cost: costs, prune."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import RELEASES, Json, Overrides, Set, app, chosen, print_json, print_table

if TYPE_CHECKING:
    from flows.doctor import Finding
    from tinycats_core.training.runs import RunState

PANEL = "This machine, and costs"


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
def prune(
    keep: Annotated[int, typer.Option(help="how many of the newest runs stay")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be deleted")] = False,
) -> None:
    """Delete all but the newest runs from the outputs volume on Modal."""
    from tinycats_core.compute.volumes import prune

    print("\n".join(prune(keep, dry_run)) or "no runs")


@app.command(rich_help_panel=PANEL)
def runs(as_json: Json = False) -> None:
    """List the training runs on this machine: their state, steps and folders, the newest first."""
    from tinycats_core.files import home
    from tinycats_core.training.runs import list_runs

    found = list_runs(home("training"))
    if as_json:
        print_json([{**run._asdict(), "folder": str(run.folder)} for run in found])
        return
    if not found:
        print(f"no runs in {home('training')}")
        return
    rows = [(_said(run), f"{run.step:,} of {run.steps:,}", run.when, str(run.folder)) for run in found]
    print_table([("state", "steps", "last change", "folder"), *rows])


def _said(run: "RunState") -> str:
    if run.state != "stopped":
        return run.state
    return f"stopped; resumes from step {run.resumes_from:,}" if run.resumes_from else "stopped; starts over"


@app.command(rich_help_panel=PANEL)
def where(as_json: Json = False) -> None:
    """Show what lies in .tinycats/ and releases/, and how large it is."""
    from tinycats_core.files import HOME, home, size_of

    places = [(home(name), what) for name, what in HOME.items()]
    places.append((RELEASES.absolute(), "the registry: every release, and which one is published"))
    found = [(folder, *size_of(folder), what) for folder, what in places]
    if as_json:
        print_json([dict(zip(("folder", "bytes", "files", "content"), (str(row[0]), *row[1:]), strict=True)) for row in found])
        return
    rows = [(str(folder), f"{size / 1e6:,.1f} MB", f"{files:,}", what) for folder, size, files, what in found]
    print_table([("folder", "size", "files", "content"), *rows])


@app.command(rich_help_panel=PANEL)
def doctor(as_json: Json = False) -> None:
    """Say what this machine lacks and what to do. Exit status 1 if it lacks what a release on this machine needs."""
    from flows.doctor import examine

    findings = list(examine())
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        _print_findings(findings)
    raise typer.Exit(int(any(finding.state == "missing" for finding in findings)))


def _print_findings(findings: "Sequence[Finding]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": Text("ok", "green"), "optional": Text("optional", "yellow"), "missing": Text("missing", "bold red")}
    table = Table("", "state", "found", "what to do", box=box.SIMPLE_HEAD, show_edge=False)
    for finding in findings:
        table.add_row(Text(finding.name), marks[finding.state], Text(finding.found, overflow="fold"), Text(finding.advice))
    Console().print(table)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    print(f"missing for a release on this machine: {', '.join(missing)}" if missing else "ready for a release on this machine")
