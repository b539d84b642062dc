"""Runs whose process is gone: marked on the server, so that nothing waits for them."""

import logging
from collections.abc import Collection
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed, Scheduled

logger = logging.getLogger("tinycats")

ACTIVE = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
GONE = "Its process is gone: it was killed, or the worker, the server or the machine stopped. Run it again: it resumes."


def active_runs(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    """Return the runs of a work pool that the server believes to have a process."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ACTIVE)))
    of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    return client.read_flow_runs(work_pool_filter=of_pool, flow_run_filter=FlowRunFilter(state=state))


def is_shared(client: SyncPrefectClient, pool: str, worker: str) -> bool:
    """Return whether a worker other than this one serves the pool now: its runs have no process here."""
    return any(other.name != worker and other.status == "ONLINE" for other in client.read_workers_for_work_pool(pool))


def settle(client: SyncPrefectClient, runs: Collection[FlowRun], why: str = GONE) -> None:
    """Mark runs that have no process: Crashed, Cancelled if that was asked for, waiting again if they had not begun."""
    for run in runs:
        state = _settled(run, why)
        client.set_flow_run_state(run.id, state, force=True)
        logger.warning("%s: its process is gone; it was %s and is %s now", run.name, run.state_name, state.name)


def free_slots(client: SyncPrefectClient, pool: str) -> None:
    """Free the concurrency slots that no run holds. Only while no worker takes any."""
    of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    holders = [run.deployment_id for run in active_runs(client, pool)]
    for deployment in client.read_deployments(work_pool_filter=of_pool, deployment_filter=DeploymentFilter()):
        limit, held = deployment.global_concurrency_limit, holders.count(deployment.id)
        if limit and limit.active_slots > held:
            client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=held))
            logger.warning("%s: freed %d of %d slots, which no run held", deployment.name, limit.active_slots - held, limit.limit)


def seconds_in_state(run: FlowRun) -> float:
    """Return how long a run has been in its state."""
    return (datetime.now(UTC) - run.state.timestamp).total_seconds() if run.state else 0.0


def cancelling(runs: Collection[FlowRun]) -> list[FlowRun]:
    """Return the runs that somebody has cancelled."""
    return [run for run in runs if run.state_type == StateType.CANCELLING]


def _settled(run: FlowRun, why: str) -> State:
    match run.state_type:
        case StateType.CANCELLING:
            return Cancelled(message="It was cancelled.")
        case StateType.PENDING:
            return Scheduled(message="The worker stopped before the run began.")
        case _:
            return Crashed(message=why)
