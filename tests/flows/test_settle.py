"""What `tinycats up` does about runs without a process, and about what a team has set on the server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Cancelling, Pending, Running

from deployments import deploy, processes, serve, settle

URL = "http://127.0.0.1:9/api"


@flow
def idle() -> None:
    """Do nothing."""


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def deployment(client: SyncPrefectClient) -> UUID:
    """A deployment of its own in the pool, of which one run may run at a time."""
    deploy.create_pool(client)
    return client.create_deployment(
        client.create_flow(idle), name=f"idle {uuid4()}", work_pool_name=deploy.POOL, concurrency_limit=1, entrypoint="old.py:idle"
    )


def run_in(client: SyncPrefectClient, deployment: UUID, *states: State) -> FlowRun:
    """Return a run that has gone through some states, without a process."""
    run = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(run.id, state)
    return client.read_flow_run(run.id)


def test_runs_without_a_process_end_and_their_slots_are_free(client: SyncPrefectClient, deployment: UUID):
    for states, name in (
        ([Pending()], "Scheduled"),
        ([Pending(), Running()], "Crashed"),
        ([Pending(), Running(), Cancelling()], "Cancelled"),
    ):
        run = run_in(client, deployment, *states)
        assert run.state_name == states[-1].name
        (found,) = [one for one in settle.active_runs(client, deploy.POOL) if one.id == run.id]
        settle.settle(client, [found])
        assert client.read_flow_run(run.id).state_name == name
        assert run.id not in {one.id for one in settle.active_runs(client, deploy.POOL)}
        settle.free_slots(client, deploy.POOL)
        limit = client.read_deployment(deployment).global_concurrency_limit
        assert limit
        assert limit.active_slots == 0
        client.delete_flow_run(run.id)


def test_a_slot_that_no_run_holds_is_freed_and_one_that_is_held_stays(client: SyncPrefectClient, deployment: UUID):
    run = run_in(client, deployment, Pending(), Running())
    settle.free_slots(client, deploy.POOL)
    held = client.read_deployment(deployment).global_concurrency_limit
    client.delete_flow_run(run.id)
    settle.free_slots(client, deploy.POOL)
    free = client.read_deployment(deployment).global_concurrency_limit
    assert held
    assert free
    assert (held.active_slots, free.active_slots) == (1, 0)


def test_what_a_team_has_set_stays(client: SyncPrefectClient, deployment: UUID):
    theirs = DeploymentScheduleUpdate(schedule=CronSchedule(cron="0 4 * * *"), active=False)
    client.update_deployment(
        deployment, DeploymentUpdate(description="ours", tags=["team"], schedules=[theirs], concurrency_limit=3)
    )
    client.update_work_pool(deploy.POOL, WorkPoolUpdate(concurrency_limit=7, description="big"))
    deploy.create_pool(client)
    deploy.update(client, client.read_deployment(deployment), deploy.declared()["train-classifier/smoke"])
    now, pool = client.read_deployment(deployment), client.read_work_pool(deploy.POOL)
    assert now.entrypoint == "flows.train_classifier.train_classifier"
    assert {"preset", "overrides"} == {*(now.parameter_openapi_schema or {})["properties"]}
    assert now.global_concurrency_limit
    assert (now.description, now.tags, now.global_concurrency_limit.limit) == ("ours", ["team"], 3)
    assert [(item.active, getattr(item.schedule, "cron", None)) for item in now.schedules] == [(False, "0 4 * * *")]
    assert (pool.concurrency_limit, pool.description) == (7, "big")


@contextmanager
def process_of(run: UUID, code: str) -> Iterator[psutil.Process]:
    """Yield a process that looks like that of a flow run, after it has written a line."""
    environment = {**os.environ, processes.RUN: str(run), processes.SERVER: URL}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield psutil.Process(process.pid)
        process.kill()


CHILD = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1); print(1, flush=True); p.wait()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"


def test_the_processes_of_a_run_are_found_by_their_server_and_end():
    with process_of(run := uuid4(), CHILD) as first:
        found = processes.of_runs(URL)[run]
        assert (found.first.pid, len(found.others)) == (first.pid, 1)
        assert found.is_child_of(os.getpid())
        assert run not in processes.of_runs("http://127.0.0.1:10/api")
        assert processes.end(found.all, patience=20)
        assert run not in processes.of_runs(URL)


def test_a_process_that_does_not_end_is_killed_in_the_end_or_at_once_when_hurried():
    for patience, hurried in ((0.1, False), (60, True)):
        with process_of(run := uuid4(), STUBBORN):
            assert not processes.end(processes.of_runs(URL)[run].all, patience, lambda hurried=hurried: hurried)
            assert run not in processes.of_runs(URL)


def test_what_a_killed_up_has_left_is_found_and_one_that_runs_is_named(monkeypatch: pytest.MonkeyPatch):
    def left() -> tuple[int | None, int]:
        number, found = processes.of_other_up(URL)
        return number, len(found)

    environment = {**os.environ, processes.SERVER: URL}
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    for mark, expected in (
        (processes.mark(), (None, 0)),
        ("1 12.5", (None, 1)),
        (f"{os.getppid()} {psutil.Process(os.getppid()).create_time()}", (os.getppid(), 0)),
    ):
        with subprocess.Popen(
            command, env=environment | {processes.UP: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            process.stdout.readline()
            assert left() == expected
            process.kill()


def test_how_a_process_ended_is_said_in_words():
    assert serve.ended(3) == "with exit status 3"
    assert serve.ended(-9) == "by SIGKILL (somebody killed it, or memory ran out)"
    assert serve.ended(-15) == "by SIGTERM"
