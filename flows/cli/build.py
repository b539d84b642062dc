"""Commands that run a flow: release, evaluate, classifier; up, which serves them; and automations, which tell of them."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import AnyRelease, Overrides, Preset, Set, app, chosen

PANEL = "Make"


@app.command(rich_help_panel=PANEL)
def release(
    preset: Preset = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="your own photos; the preset is `photos` then")] = None,
    minutes: Annotated[float | None, typer.Option(help="what the whole release may take on this machine")] = None,
    dollars: Annotated[float | None, typer.Option(help="what the training may cost on Modal")] = None,
    sets: Set = None,
    overrides: Overrides = "{}",
    keep_results: Annotated[bool, typer.Option("--keep-results", help="use results of stages whose code has changed")] = False,
    force: Annotated[str | None, typer.Option(metavar="WHY", help="publish what the gate refuses, and record why")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what publishing would change, and publish nothing")] = False,
) -> None:
    """Train, judge and publish a generator. The same command again resumes, or finds everything done.

    Without options it makes the smoke release from drawn cats, in a few minutes on a laptop. With --minutes, the speed of this
    machine and the number of photos decide the network and the steps; what is set by hand stays.
    """
    from tinycats_core.presets import merge, resolve
    from tinycats_core.release.history import check_why

    preset = preset or ("photos" if data else "smoke")
    given = chosen(overrides, sets, {"data": {"source": "folder", "folder": str(data)}} if data else None)
    amounts = {"minutes": minutes, "dollars": dollars}
    given = merge(given, {"budget": amount} if (amount := {k: v for k, v in amounts.items() if v is not None}) else {})
    resolve(preset, given)  # before a server is started for a typo
    if force is not None:
        check_why(force)

    from flows.release_model import release_model
    from flows.shell import run

    options = {"keep_results": keep_results, "force": force, "dry_run": dry_run}
    raise typer.Exit(run(lambda: release_model(preset, given, **options)))


@app.command(rich_help_panel=PANEL)
def evaluate(release: AnyRelease, sets: Set = None, overrides: Overrides = "{}") -> None:
    """Measure a release again, with its own weights, configuration and classifier."""
    given = chosen(overrides, sets)

    from flows.evaluate_model import evaluate_model
    from flows.shell import run

    raise typer.Exit(run(lambda: evaluate_model(release, given)))


@app.command(rich_help_panel=PANEL)
def classifier(preset: Preset = None, sets: Set = None, overrides: Overrides = "{}") -> None:
    """Train the breed classifier alone, on the data of a preset."""
    from tinycats_core.presets import resolve

    given = chosen(overrides, sets)
    resolve(preset or "smoke", given)

    from flows.shell import run
    from flows.train_classifier import train_classifier

    raise typer.Exit(run(lambda: train_classifier(preset or "smoke", given)))


@app.command(rich_help_panel=PANEL)
def up() -> None:
    """Start a Prefect server, a work pool, a worker and every deployment, until Ctrl-C: what `make serve` does."""
    from importlib import import_module

    raise typer.Exit(import_module("deployments.serve").main())  # deployments stand above the flows, which do not know them


@app.command(rich_help_panel=PANEL)
def automations(
    notify: Annotated[str | None, typer.Option(metavar="TYPE/NAME", help="the block to notify, such as slack-webhook/cats")] = None,
) -> None:
    """Bring the automations to the Prefect server: runs without a heartbeat are marked, and what needs a person is told."""
    from importlib import import_module

    raise typer.Exit(import_module("deployments.automations").main(["--notify", notify] if notify else []))
