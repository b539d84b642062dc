"""What the tests of the page share: a runtime of a few bytes, the real one from npm, and a browser."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tinycats_core.errors import RegistryError
from tinycats_core.files import sha256_of
from tinycats_core.records import WebRuntime
from tinycats_core.release import web_runtime

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def small_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> WebRuntime:
    """Write a runtime that computes nothing, and make it the one that is wanted."""
    source, cache = folder / "given", folder / "cache"
    source.mkdir()
    for name in web_runtime.SHA256:
        (source / name).write_text(f"stands for {name}")
    monkeypatch.setattr(web_runtime, "SHA256", {name: sha256_of(source / name) for name in web_runtime.SHA256})
    monkeypatch.setattr(web_runtime, "BYTES", {name: (source / name).stat().st_size for name in web_runtime.SHA256})
    return web_runtime.fetch(cache, str(source))


def real_runtime(config: pytest.Config) -> WebRuntime:
    """Return the runtime from npm, kept between test runs; skip the test if it cannot be fetched."""
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    folder = cache.mkdir("web") if cache else Path(tempfile.gettempdir()) / "tinycats-web"
    try:
        return web_runtime.fetch(folder)
    except RegistryError as error:
        pytest.skip(str(error))


@contextmanager
def browser() -> Iterator["Browser"]:
    """Start the Chromium of this machine; skip the test if there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium, or set CHROMIUM to its path")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()
