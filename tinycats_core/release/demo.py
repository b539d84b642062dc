"""A web server for the page of a release, for this machine alone."""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tinycats_core.errors import TinycatsError
from tinycats_core.files import home
from tinycats_core.records import Release
from tinycats_core.release import page, web_runtime

HOST = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  the library's own, whose types depend on the machine
        "": "application/octet-stream",
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".wasm": "application/wasm",
        ".md": "text/plain; charset=utf-8",
        ".txt": "text/plain; charset=utf-8",
        ".json": "application/json",
        ".png": "image/png",
    }

    def end_headers(self) -> None:
        # With these two a page may compute in several threads, which large networks need.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "File not found")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(release: Release, port: int) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """Serve the page of a verified release, and yield the server and the address of the page.

    A release that was made without a page gets one in a temporary folder; the release itself stays as it is.

    Args:
        port: 0 for any that is free.

    Raises:
        RegistryError: the release has no page and its runtime cannot be fetched.
        TinycatsError: the port is taken, or not allowed.
    """
    with tempfile.TemporaryDirectory(prefix="tinycats-") as temporary:
        folder, way = release.folder, f"{page.DEMO}/"
        if not (folder / page.DEMO / "index.html").is_file():
            folder, way = Path(temporary), ""
            runtime = web_runtime.fetch(home("web"))
            page.write_demo(release.folder, folder, runtime, release.name, release.version, models="")
            for path in page.files_of(release.folder):
                (folder / path.name).symlink_to(path)
            (folder / "README.md").symlink_to(release.folder / "README.md")
        try:
            server = ThreadingHTTPServer((HOST, port), functools.partial(_Handler, directory=str(folder)))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TinycatsError(f"--port is {port}, which cannot be used on {HOST}: {reason}. Give another one, or 0.") from None
        try:
            yield server, f"http://{HOST}:{server.server_port}/{way}"
        finally:
            server.server_close()
