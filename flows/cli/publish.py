"""Commands about releases that are made: verify, bench, promote, rollback, history."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import build
from flows.cli.common import RELEASES, Json, ReleaseFolder, app, print_json, print_table
from tinycats_core.errors import masked

if TYPE_CHECKING:
    from tinycats_core.records import Release

Name = Annotated[str, typer.Argument(help="the name of a release, such as tinycats-smoke")]
Folder = Annotated[Path, typer.Option(help="the registry, a folder")]
Hub = Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="a repository on the Hugging Face Hub, instead of a folder")]

PANEL = "Check and publish"


@app.command(rich_help_panel=PANEL)
def verify(
    release: Annotated[str, typer.Argument(help="a release folder, or hub:owner/name")],
    figures: Annotated[
        bool, typer.Option("--figures", help="draw and measure again, and compare with the recorded figures")
    ] = False,
    overrides: Annotated[str, typer.Option(metavar="JSON", help="with --figures: such as where the images are")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Check every file of a release and its lineage. Exit status 1 if a file has changed or a link is broken."""
    from tinycats_core.presets import parse_overrides
    from tinycats_core.release import lineage

    settings, opened = parse_overrides(overrides), None
    if release.startswith("hub:"):
        from tinycats_core.release import shipped

        opened = shipped.open_release(release)
    result = lineage.inspect(opened.folder if opened else Path(release))
    if figures and not result["wrong"]:
        from tinycats_core.release import shipped
        from tinycats_core.release.figures import measure_again

        rows = measure_again(opened or shipped.open_release(release), settings)
        result["figures"] = [{**row._asdict(), "holds": row.holds} for row in rows]
        result["wrong"] = [f"{row.metric} is {row.now}, recorded was {row.recorded}" for row in rows if not row.holds]
    if as_json:
        print_json(result)
    else:
        _print_verified(result)
    if result["wrong"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def bench(release: ReleaseFolder, device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto") -> None:
    """Measure how fast a release draws in each runtime on this machine, and print the figures as JSON."""
    from tinycats_core.release.inference import measure_release

    print_json(measure_release(release, device))


@app.command(rich_help_panel=PANEL)
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
        build.release(preset=preset, overrides=overrides, force=why, dry_run=dry_run)
    if release is None or (preset, overrides, why) != (None, "{}", None):
        raise typer.BadParameter("give a release folder; --preset, --overrides and --why go with --force")
    if dry_run:
        print("\n".join(plan_lines(promotion.plan_promotion(release, hub))))
    else:
        _print_published(promotion.promote(release, hub))


@app.command(rich_help_panel=PANEL)
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


@app.command(rich_help_panel=PANEL)
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


def _print_verified(result: Mapping[str, Any]) -> None:
    """Print the lineage and the figures, and on stderr what is wrong."""
    links = {}
    for check in result["lineage"]:
        links.setdefault(check["link"], []).append(check)
    if links:
        rows = [(link, f"{sum(item['holds'] for item in of)}/{len(of)}", of[0]["found"] or "-") for link, of in links.items()]
        print_table([("link", "holds", "first digest"), *((link, holds, digest[:12]) for link, holds, digest in rows)])
    if figures := result.get("figures"):
        names = ("metric", "recorded", "now", "difference", "allowed", "why")
        print_table([names, *(["-" if row[name] is None else f"{row[name]}" for name in names] for row in figures)])
    if result["wrong"]:
        print("\n".join(masked(line) for line in result["wrong"]), file=sys.stderr)
    else:
        print(f"{result['name']} {result['version']}: {result['files']} files, all as they were made; the lineage is unbroken")


def _print_published(release: "Release") -> None:
    print(f"{release.name} {release.version} is published: {release.location}")
