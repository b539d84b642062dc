"""Commands that draw from a release: sample and compare."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import AnyRelease, Json, app, print_json


@app.command()
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
