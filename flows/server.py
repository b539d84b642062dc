"""The Prefect server that a flow talks to: whether it answers, which version it is, and a port for a temporary one."""

import json
import socket
import urllib.request
from http.client import HTTPException
from importlib.metadata import version

from tinycats_core.errors import TinycatsError

ANSWER_SECONDS = 5.0


def answers(url: str) -> bool:
    """Return whether a Prefect server answers at the URL."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_SECONDS) as response:
            return response.read().strip() == b"true"
    except (OSError, HTTPException, ValueError):  # nobody, something that speaks no HTTP, a name that no host can have
        return False


def version_of(url: str) -> str | None:
    """Return the version of the Prefect server at the URL, None if it does not say."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/admin/version", timeout=ANSWER_SECONDS) as response:
            return str(json.load(response))
    except (OSError, HTTPException, ValueError):
        return None


def check_server(url: str) -> None:
    """Raise TinycatsError if nothing answers at the URL, or a server that is older than the client."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
    except urllib.request.HTTPError:
        pass  # it answers: one that asks for a password, say
    except (OSError, HTTPException, ValueError) as error:
        why = f"it accepts connections and says nothing for {ANSWER_SECONDS:g} s" if _is_timeout(error) else "nothing answers there"
        raise TinycatsError(
            f"no Prefect server answers at PREFECT_API_URL={url}: {why}. Start one with `make serve`, or unset PREFECT_API_URL."
        ) from None
    theirs, ours = version_of(url), version("prefect")
    if theirs and _numbers(theirs) < _numbers(ours):
        raise TinycatsError(
            f"the Prefect server at {url} is {theirs}, older than Prefect {ours} here. Upgrade it, or unset PREFECT_API_URL."
        )


def free_port() -> int:
    """Return a port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def give_temporary_server_a_port() -> None:
    """Let the system choose the port of the server that Prefect starts for a flow.

    Prefect draws one of a thousand. Two commands that draw the same one share a server, and the second fails when the first ends.
    """
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    if server.port is None:
        server.port = free_port()


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the minor version that decides whether server and client fit, such as (3, 9)."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
