"""The page of a release in headless Chromium: how soon it draws, whether it stays responsive, whom it asks, who can use it.

    python -m benchmarks.page --release releases/tinycats-smoke/latest --pictures docs/demo

`first_cat_s` counts from opening the page to the first picture, `cat_ms` is the mean time of a picture in the worker.
`free` is the share of ticks of 20 ms that the page's own thread keeps while the worker draws. The large network has random
weights: 33 million, 128 px. axe-core, from npm, looks for faults that keep people from using the page. `holds` says whether
all bars hold: BARS.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.common import ROOT, command_line, report
from tinycats_core.errors import ExportError, TinycatsError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ViewportSize

    from tinycats_core.records import Release, WebRuntime

AXE = "axe-core@4.10.3"
BARS = {"first_cat_s": 3.0, "cat_ms": 100.0, "single_first_cat_s": 3.0, "large_cat_ms": 1500.0}  # not to be exceeded
FREE = 0.5
DESKTOP: "ViewportSize" = {"width": 1100, "height": 900}
PHONE: "ViewportSize" = {"width": 390, "height": 844}
DONE = "#save:not([disabled]), #problem:not([hidden])"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
TICKS = """() => { globalThis.ticks = 0; globalThis.since = performance.now(); setInterval(() => ticks++, 20); }"""
KEPT = "() => ticks / ((performance.now() - since) / 20)"


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if all bars hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--release", type=Path, default=ROOT / "releases" / "tinycats-smoke" / "latest", help="default: %(default)s"
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write screenshots: desktop.png, phone.png and dark.png")
    parser.add_argument("--quick", action="store_true", help="without the large network and the accessibility check")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch, chromium() as browser:
        figures = measure(given, Path(scratch), browser)
    report("page", figures, given)
    return 0 if figures["holds"] else 1


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Start the Chromium of this machine. Raises TinycatsError."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        raise TinycatsError("Chromium or its driver is not installed: apt-get install chromium, pip install '.[dev]'")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


def measure(given: argparse.Namespace, scratch: Path, browser: "Browser") -> dict[str, Any]:
    """Return the figures of a release, and of a large network."""
    from tinycats_core.files import home
    from tinycats_core.release import manifest, page, web_runtime

    release, runtime = manifest.read_release(given.release), web_runtime.fetch(home("web"))
    copy = Path(shutil.copytree(release.folder, scratch / "release"))
    page.write(copy, runtime, release.name, release.version)
    release = release.model_copy(update={"path": copy / "release.json"})
    figures = {
        **opened(browser, release, None),
        **{f"single_{name}": value for name, value in opened(browser, release, copy / "cats.html").items()},
        "single_bytes": (copy / "cats.html").stat().st_size,
    }
    if given.pictures:
        screenshots(browser, release, given.pictures)
    if not given.quick:
        figures["axe_serious"] = serious_faults(browser, copy / "cats.html", scratch)
        large = large_release(release, runtime, scratch / "large")
        figures |= {f"large_{name}": value for name, value in opened(browser, large, None, breed="Siamese").items()}
    holds = all(figures[name] <= bar for name, bar in BARS.items() if name in figures) and not figures.get("axe_serious")
    free = min(value for name, value in figures.items() if name.endswith("free")) >= FREE
    return figures | {"holds": holds and free and not any(figures[name] for name in figures if name.endswith("foreign_requests"))}


@contextmanager
def served(release: "Release") -> Iterator[str]:
    from tinycats_core.release import demo

    with demo.serve(release, 0) as (server, address):
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield address
        server.shutdown()


def opened(browser: "Browser", release: "Release", file: Path | None, breed: str = "every breed") -> dict[str, Any]:
    """Open a page anew, draw, and return what was measured."""
    with served(release) as address:
        base = file.as_uri() if file else address
        context = browser.new_context(viewport=DESKTOP, offline=file is not None)
        new, asked = context.new_page(), []
        new.set_default_timeout(120_000)
        new.on("request", lambda request: asked.append(request.url))
        new.add_init_script(f"({TICKS})()")
        begun = time.perf_counter()
        new.goto(f"{base}#breed={breed}&n=1&seed=1")
        new.wait_for_selector("#cats img[src], #problem:not([hidden])")
        first = time.perf_counter() - begun
        new.wait_for_selector(DONE)
        if problem := new.inner_text("#problem"):
            raise ExportError(f"the page says: {problem}")
        new.evaluate("() => { ticks = 0; since = performance.now(); }")
        new.fill("#n", "4" if breed == "every breed" else "3")
        new.click("#draw")
        new.wait_for_selector(DONE)
        free = new.evaluate(KEPT)
        milliseconds = float(new.inner_text("#status").split(" ms each")[0].rsplit(" ", 1)[1])
        context.close()
    ours = (address.split("/demo")[0].rstrip("/"), "blob:", "data:", "file:")
    foreign = sum(not url.startswith(ours) for url in asked)
    return {"first_cat_s": round(first, 2), "cat_ms": milliseconds, "free": round(free, 2), "foreign_requests": foreign}


def screenshots(browser: "Browser", release: "Release", folder: Path) -> None:
    """Write pictures of the page once it has drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    shown: list[tuple[str, ViewportSize, Literal["light", "dark"]]]
    shown = [("desktop", DESKTOP, "light"), ("phone", PHONE, "light"), ("dark", PHONE, "dark")]
    for name, viewport, scheme in shown:
        with served(release) as address:
            context = browser.new_context(viewport=viewport, color_scheme=scheme)
            new = context.new_page()
            new.goto(address)
            new.wait_for_selector(DONE)
            new.screenshot(path=folder / f"{name}.png", full_page=name != "desktop")
            context.close()


def serious_faults(browser: "Browser", file: Path, scratch: Path) -> int:
    """Return how many serious and critical faults axe-core finds on the page, in light and dark."""
    subprocess.run(
        ["npm", "pack", AXE, "--silent", "--pack-destination", str(scratch)], check=True, capture_output=True, timeout=120
    )
    with tarfile.open(next(scratch.glob("axe-core*.tgz"))) as packed:
        found = packed.extractfile("package/axe.min.js")
        assert found is not None
        script = found.read().decode()
    count = 0
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        context = browser.new_context(color_scheme=scheme, bypass_csp=True)
        new = context.new_page()
        new.goto(file.as_uri())
        new.wait_for_selector(DONE)
        new.evaluate(script)
        faults = new.evaluate("async () => (await axe.run()).violations.map(({id, impact}) => [id, impact])")
        for name, impact in faults:
            print(f"{scheme}: {name} ({impact})", file=sys.stderr)
        count += sum(impact in ("serious", "critical") for _, impact in faults)
        context.close()
    return count


def large_release(like: "Release", runtime: "WebRuntime", folder: Path) -> "Release":
    """Return a release like another one, whose int8 graph is a random network of 33 million parameters at 128 px."""
    from benchmarks.export.__main__ import LARGE, random_network
    from tinycats_core.config import ExportConfig, SampleConfig
    from tinycats_core.files import read_json, write_json
    from tinycats_core.release import export, graph, page

    shutil.copytree(like.folder, folder, ignore=shutil.ignore_patterns("*.onnx", "demo", "cats.html"))
    settings = SampleConfig(guidance=1.0)
    network = random_network(LARGE, settings, folder)
    int8 = export.quantize(export.export_denoiser(network.weights, ExportConfig(), folder), folder)
    export.write(graph.compose(int8, settings), folder / "cats-int8.onnx", "int8")
    for file, change in (("data.json", {"image_size": LARGE.image_size}), ("precision.json", {"chosen": "int8"})):
        write_json(folder / file, read_json(folder / file) | change)
    sweep = read_json(folder / "sweep.json")
    write_json(folder / "sweep.json", sweep | {"sample": sweep["sample"] | {"guidance": 1.0}})
    page.write_demo(folder, folder / "demo", runtime, like.name, like.version)
    return like.model_copy(update={"path": folder / "release.json"})


if __name__ == "__main__":
    sys.exit(main())
