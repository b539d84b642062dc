"""What the commands share: the application, its options, and how they print."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = "Exit status: 0 done; 1 an error, said in one line; 2 wrong arguments; 130 Ctrl-C; 143 SIGTERM."

app = typer.Typer(
    help="Make, draw, measure and publish small cat generators.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RELEASES = Path("releases")
ReleaseFolder = Annotated[Path, typer.Argument(help="a release folder")]
AnyRelease = Annotated[str, typer.Argument(help="a release folder, or hub:OWNER/NAME")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]
Preset = Annotated[str | None, typer.Option(help="smoke, photos, standard, budget, high-accuracy, aggressive or max-quality")]
Overrides = Annotated[str, typer.Option(metavar="JSON", help='many settings at once: \'{"train": {"steps": 100}}\'')]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="PART.FIELD=VALUE", help="one setting, such as train.steps=100")]


@app.callback()
def command() -> None:
    """Make, draw, measure and publish small cat generators."""


def chosen(overrides: str, sets: Sequence[str] | None, under: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the nested settings of --overrides on top of `under`, and of each --set on top of both. Raises ConfigError."""
    from tinycats_core.presets import merge, parse_overrides, parse_settings

    return merge(merge(under or {}, parse_overrides(overrides)), parse_settings(sets or ()))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, as plain text that other programs can cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, allow_nan=False))
