"""Commands about releases that are made: verify, bench, promote, rollback, history."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import RELEASES, Json, ReleaseFolder, app, print_json, print_table

if TYPE_CHECKING:
    from tinycats_core.records import Release

Name = Annotated[str, typer.Argument(help="the name of a release, such as tinycats-smoke")]
Folder = Annotated[Path, typer.Option(help="the registry, a folder")]
Hub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="a repository on the Hugging Face Hub, instead of a folder")]


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
def promote(
    release: Annotated[Path | None, typer.Argument(help="a built release that is to be published")] = None,
    hub: Hub = None,
    preset: Annotated[str | None, typer.Option(help="with --force: the preset of the release that the gate refused")] = None,
    overrides: Annotated[str, typer.Option(metavar="JSON", help="with --force: its overrides")] = "{}",
    force: Annotated[bool, typer.Option("--force", help="publish what the gate refused, and record it")] = False,
    why: Annotated[str | None, typer.Option(help="with --force: the reason, for decision.json and the card")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would change, file by file")] = False,
) -> None:
    """Publish a release that was built before, or with --force one that the gate refused."""
    from tinycats_core.release import promotion
    from tinycats_core.release.plan import plan_lines

    if force:
        if release is not None or hub is not None or preset is None or why is None:
            raise typer.BadParameter("--force takes --preset, --overrides and --why, and makes the release again from the cache")
        from flows.release_model import main as release_model

        arguments = ["--preset", preset, "--overrides", overrides, f"--force={why}", *["--dry-run"] * dry_run]
        raise typer.Exit(release_model(arguments))
    if release is None or (preset, overrides, why) != (None, "{}", None):
        raise typer.BadParameter("give a release folder; --preset, --overrides and --why go with --force")
    if dry_run:
        print("\n".join(plan_lines(promotion.plan_promotion(release, hub))))
    else:
        _print_published(promotion.promote(release, hub))


@app.command()
def rollback(
    name: Name,
    to: Annotated[str, typer.Option(metavar="VERSION", help="the version to publish again")],
    why: Annotated[str, typer.Option(help="the reason, for the history")],
    folder: Folder = RELEASES,
    hub: Hub = None,
) -> None:
    """Publish an earlier version of a release again."""
    from tinycats_core.files import home
    from tinycats_core.release import hub as on_hub
    from tinycats_core.release import registry

    if hub:
        _print_published(on_hub.rollback(hub, name, to, why, home("downloads")))
    else:
        _print_published(registry.rollback(folder, name, to, why))


@app.command()
def history(name: Name, folder: Folder = RELEASES, hub: Hub = None, as_json: Json = False) -> None:
    """Print what was published under a name, when, how and why, oldest first."""
    from tinycats_core.release import hub as on_hub
    from tinycats_core.release import registry

    entries = on_hub.read_history(hub, name) if hub else registry.read_history(folder, name)
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    rows = [(entry.at or "unknown", entry.how, entry.version, entry.before or "-", entry.why or "") for entry in entries]
    print_table([("at", "how", "version", "instead of", "why"), *rows])


def _print_published(release: "Release") -> None:
    print(f"{release.name} {release.version} is published: {release.location}")
