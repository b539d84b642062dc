"""What a command says of the Prefect server that it is told to use, and where a temporary one listens."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import server, shell
from tinycats_core.errors import TinycatsError


@contextmanager
def answering(version: str) -> Iterator[str]:
    """Yield the address of something that answers like a Prefect server of a version."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(version if self.path.endswith("version") else True).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as there:
        Thread(target=there.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{there.server_port}/api"
        there.shutdown()


def test_an_old_server_is_one_line_and_a_newer_one_is_used():
    with answering("3.8.8") as url, pytest.raises(TinycatsError, match=r"is 3\.8\.8, older than Prefect .* here\. Upgrade it"):
        server.check_server(url)
    with answering("3.99.0") as url:
        server.check_server(url)
        assert server.answers(url)


def test_an_address_that_accepts_and_never_answers_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.2)
    called: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            assert shell.run(lambda: called.append(1)) == 1
    assert (called, capsys.readouterr().err.count("\n")) == ([], 1)
    with (
        pytest.raises(TinycatsError, match="accepts connections and says nothing"),
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        server.check_server(f"http://127.0.0.1:{silent.getsockname()[1]}/api")
    with pytest.raises(TinycatsError, match="nothing answers there"):
        server.check_server(url)


def test_the_system_chooses_the_port_of_a_temporary_server(monkeypatch: pytest.MonkeyPatch):
    from prefect.server.api.server import SubprocessASGIServer

    monkeypatch.setattr(SubprocessASGIServer, "_instances", {})
    server.give_temporary_server_a_port()
    port = SubprocessASGIServer().port
    assert port
    assert port not in range(8000, 9000)
    server.give_temporary_server_a_port()  # one that has its port keeps it
    assert SubprocessASGIServer().port == port
