"""`make serve` as a user meets it: a server, a worker and every deployment, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.serve import DEFAULT_URL, server_url
from flows.server import answers
from tinycats_core.presets import PRESETS

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "deployments.serve"]
NAMES = {
    *(f"release-model/{preset}" for preset in PRESETS),
    "nightly-eval/nightly",
    "evaluate-model/published",
    "train-classifier/smoke",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose server has a free port and a database of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}


@pytest.fixture
def served(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    output = tmp_path / "output"
    with open(output, "wb") as file:
        # As a shell starts a background job: with SIGINT ignored, which the command must not leave so.
        background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *SERVE]
        process = subprocess.Popen(background, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while "serving. Pages:" not in output.read_text():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.5)
    yield process
    process.kill()
    process.wait()


def ended(client: SyncPrefectClient, run: FlowRun) -> State:
    """Wait until the worker has brought a run to its end, and return how it ended."""
    deadline = time.monotonic() + 240
    while not (state := client.read_flow_run(run.id).state) or not state.is_final():
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    return state


def test_a_deployment_runs_in_the_worker_and_everything_stops(
    served: subprocess.Popen[bytes], environment: dict[str, str], tiny: dict[str, Any]
) -> None:
    with (
        temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}),
        get_client(sync_client=True) as client,
    ):
        flows = {flow.id: flow.name for flow in client.read_flows()}
        deployed = {f"{flows[item.flow_id]}/{item.name}": item for item in client.read_deployments()}
        assert deployed.keys() == NAMES
        assert [item.schedule.model_dump()["cron"] for item in deployed["nightly-eval/nightly"].schedules] == ["0 3 * * *"]
        assert str(ROOT) not in " ".join(item.model_dump_json() for item in deployed.values())  # a worker may be anywhere

        parameters = {"preset": "smoke", "overrides": tiny}
        done = client.create_flow_run_from_deployment(deployed["train-classifier/smoke"].id, parameters=parameters)
        assert ended(client, done).is_completed()
        (worker,) = [child for child in psutil.Process(served.pid).children() if "worker" in child.cmdline()]
        worker.kill()  # another one takes its place
        refused = client.create_flow_run_from_deployment(deployed["release-model/high-accuracy"].id)
        assert ended(client, refused).is_failed()

        # The server makes runs of a schedule, which Prefect 3.8 does not with SQLAlchemy 2.1.
        nightly = FlowFilter(name=FlowFilterName(any_=["nightly-eval"]))
        scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
        assert client.read_flow_runs(flow_filter=nightly, flow_run_filter=scheduled)

    served.send_signal(signal.SIGINT)
    assert served.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(environment["PREFECT_API_URL"].split(":")[-1].split("/")[0])))


def test_a_port_that_is_taken_is_an_error_of_one_line(environment: dict[str, str]) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        taken = {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{other.server_port}/api"}
        other.timeout = 30
        process = subprocess.Popen(SERVE, cwd=ROOT, env=taken, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        other.handle_request()  # it is asked whether it is a Prefect server, and says no
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith(f"error: port {other.server_port} on 127.0.0.1 is taken by something that is no Prefect server")
    assert error.count("\n") == 1


def test_a_server_elsewhere_that_does_not_answer_is_not_started_here(environment: dict[str, str]) -> None:
    elsewhere = {**environment, "PREFECT_API_URL": "http://prefect.invalid:4200/api"}
    done = subprocess.run(SERVE, cwd=ROOT, env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: PREFECT_API_URL is http://prefect.invalid:4200/api, where no Prefect server answers")


@pytest.mark.parametrize("url", ["foo", "http://127.0.0.1:abc/api", "http://127.0.0.1:99999/api", "http://[::1/api", "ftp://a/api"])
def test_what_is_no_url_of_a_server_is_an_error_of_one_line(url: str, environment: dict[str, str]) -> None:
    done = subprocess.run(SERVE, cwd=ROOT, env={**environment, "PREFECT_API_URL": url}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: PREFECT_API_URL is {url!r}; it must be a URL such as {DEFAULT_URL}. Give one, or unset it.\n"


def test_without_a_url_it_is_the_default_one() -> None:
    assert server_url("") == server_url("/") == DEFAULT_URL
    assert server_url("https://cats.example/api/") == "https://cats.example/api"


@pytest.mark.parametrize("host", ["a..b", "user:word@127.0.0.1", "a b"])
def test_at_a_name_that_no_host_has_nothing_answers(host: str) -> None:
    assert not answers(f"http://{host}/api")
