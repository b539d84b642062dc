"""Commands that draw from a release: sample, compare and demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import AnyRelease, Json, app, print_json

if TYPE_CHECKING:
    from tinycats_core.release.comparison import Comparison

PANEL = "Draw and compare"


@app.command(rich_help_panel=PANEL)
def sample(
    release: AnyRelease,
    name: Annotated[str | None, typer.Option("--class", metavar="CLASS", help="default: each class")] = None,
    n: Annotated[int, typer.Option("-n", help="pictures of each class")] = 1,
    seed: Annotated[int | None, typer.Option(help="of the noise; default: the release's own")] = None,
    guidance: Annotated[float | None, typer.Option(help="1 for none; default: the release's own")] = None,
    runtime: Annotated[str, typer.Option(help="onnx, which starts faster, or pytorch")] = "onnx",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    out: Annotated[Path, typer.Option(help="the folder for the PNG files")] = Path("cats"),
    as_json: Json = False,
) -> None:
    """Draw pictures: CLASS-NUMBER.png for each, and sheet.png with all. The same seed draws the same pictures."""
    import tinycats_core

    cats = tinycats_core.load(release, runtime, device)  # pyright: ignore[reportArgumentType]  it checks the runtime itself
    *files, sheet = cats.save(out, name, n, seed, guidance)
    if as_json:
        told = {"release": cats.release.name, "version": cats.release.version, "runtime": cats.runtime}
        print_json(told | {"files": [str(file) for file in files], "sheet": str(sheet)})
    else:
        print(f"{len(files)} picture{'s' if len(files) > 1 else ''} of {cats.release.name} {cats.release.version} in {out}")


@app.command(rich_help_panel=PANEL)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="a release folder, or hub:OWNER/NAME")],
    second: Annotated[str, typer.Argument(metavar="B", help="the other release")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page with pictures from the same noise")] = None,
    seed: Annotated[int, typer.Option(help="of the pictures' noise")] = 0,
    as_json: Json = False,
) -> None:
    """Put two releases side by side: figures, differences, which is better; with --html also pictures from the same noise."""
    import tinycats_core
    from tinycats_core.files import write_together
    from tinycats_core.release import comparison

    cats = tinycats_core.load(first, "onnx"), tinycats_core.load(second, "onnx")
    compared = comparison.compare(*cats)
    if html:
        if html.is_dir():
            raise typer.BadParameter(f"--html is {html}, a folder; give a file")
        text = comparison.page(compared, *cats, seed)
        write_together(html.parent, {html.name: lambda path: path.write_text(text, encoding="utf-8")})
    if as_json:
        print_json(compared.as_json())
    else:
        _print_comparison(compared)


@app.command(rich_help_panel=PANEL)
def demo(
    release: AnyRelease,
    port: Annotated[int, typer.Option(help="of the address; 0: any that is free")] = 8000,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Serve the page of a release on this machine, where it draws in the browser, until Ctrl-C."""
    import webbrowser

    from tinycats_core.release import shipped
    from tinycats_core.release.demo import serve

    with serve(shipped.open_release(release), port) as (server, address):
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if show:
            webbrowser.open(address)
        server.serve_forever()


def _print_comparison(compared: "Comparison") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tinycats_core.release.comparison import figure

    console, (first, second) = Console(highlight=False), compared.names
    print(f"A  {first}\nB  {second}")
    table = Table("figure", box=box.SIMPLE_HEAD, show_edge=False)
    for head in ("A", "B", "B - A"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("better")
    for row in compared.rows:
        better = "" if row.better is None else "AB"[row.better]
        values = [Text(figure(value), "bold green" if row.better == i else "") for i, value in enumerate(row.values)]
        table.add_row(Text(row.metric, no_wrap=True), *values, figure(row.difference, signed=True), better)
    console.print(table)
    if compared.obstacles:
        print("not comparable, measured on other data or under other conditions:")
        print("\n".join(f"  {line}" for line in compared.obstacles))
