"""Approval: nothing is published before a person has answered, and nothing at all when the answer is no."""

import threading
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName
from prefect.flow_runs import resume_flow_run

from tasks.publishing import wait_for_approval
from tinycats_core.config import PublishConfig
from tinycats_core.errors import ReleaseRejected
from tinycats_core.records import Release


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(path=tmp_path / "release.json", sha256="0" * 64, name="tiny", version="1", location=str(tmp_path))


@flow
def asking(approval: bool, release: Release) -> str:
    wait_for_approval(PublishConfig(approval=approval), release)
    return "published"


def answer(publish: bool) -> threading.Thread:
    """Answer, as a person does in Prefect's pages, the first run of `asking` that waits."""

    def wait_and_answer() -> None:
        ours = FlowFilter(name=FlowFilterName(any_=["asking"]))
        paused = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Paused"])))
        runs: list[UUID] = []
        with get_client(sync_client=True) as client:
            while not runs:
                time.sleep(0.2)
                runs = [run.id for run in client.read_flow_runs(flow_filter=ours, flow_run_filter=paused)]
        resume_flow_run(runs[0], run_input={"publish": publish})

    thread = threading.Thread(target=wait_and_answer, daemon=True)
    thread.start()
    return thread


def test_without_approval_nothing_waits(prefect_server: str, release: Release) -> None:
    assert asking(False, release) == "published"


def test_a_yes_lets_the_run_go_on(prefect_server: str, release: Release) -> None:
    thread = answer(True)
    assert asking(True, release) == "published"
    thread.join(10)


def test_a_no_ends_the_run(prefect_server: str, release: Release) -> None:
    thread = answer(False)
    with pytest.raises(ReleaseRejected, match="was refused by a person"):
        asking(True, release)
    thread.join(10)
