"""Serving the page of a release on this machine."""

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from page_parts import small_runtime

from tinycats_core import files
from tinycats_core.errors import TinycatsError
from tinycats_core.records import Release, ReleaseParts
from tinycats_core.release import bundle, demo, page, web_runtime


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    small_runtime(tmp_path, monkeypatch)
    web_runtime.fetch(files.home("web"), str(tmp_path / "given"))


def small() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[3])}


def get(address: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", b""


@pytest.mark.parametrize("with_page", [True, False])
def test_the_page_and_its_files_are_served(built: Release, release: Path, with_page: bool):
    opened = built.model_copy(update={"path": release / "release.json"})
    if with_page:
        page.write(release, web_runtime.fetch(files.home("web")), "x", "1")
    before = sorted(release.rglob("*"))
    with demo.serve(opened, 0) as (server, address):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            status, kind, text = get(address)
            assert (status, kind) == (200, "text/html; charset=utf-8")
            graph = "../cats-int8.onnx" if with_page else "cats-int8.onnx"
            assert f'"address": "{graph}"'.encode() in text
            assert get(address + graph)[2] == (release / "cats-int8.onnx").read_bytes()
            assert get(f"{address}runtime/{web_runtime.SCRIPT}")[1] == "text/javascript; charset=utf-8"
            assert get(f"{address}runtime/{web_runtime.WASM}")[1] == "application/wasm"
            assert [get(f"{address}{path}")[0] for path in ("runtime/", "../../../etc/passwd", "nothing.js")] == [404, 404, 404]
        finally:
            server.shutdown()
            thread.join()
    assert sorted(release.rglob("*")) == before


def test_a_port_that_is_taken_is_named(built: Release):
    with demo.serve(built, 0) as (server, _):
        for port in (server.server_port, 70_000, -1):
            with pytest.raises(TinycatsError, match=rf"--port is {port}, which cannot be used"), demo.serve(built, port):
                pass


def test_the_command_serves_until_it_is_stopped(parts: dict[str, Any], tmp_path: Path):
    made = bundle.build(tmp_path / "registry", ReleaseParts(**parts, web_runtime=web_runtime.fetch(files.home("web"))))
    command = [sys.executable, "-m", "flows.cli", "demo", str(made.folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | small()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().split()[0]
        assert get(address)[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""
