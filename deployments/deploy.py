"""What `tinycats up` brings to a server: the work pool, every deployment of prefect.yaml, and the detection of crashes.

What is there already keeps what a team has set: pauses, schedules, limits, descriptions, tags, parameters. It only learns how
its flow is found and which parameters it takes. To set a deployment back, delete it and run this again.

python -m deployments.deploy
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from deployments import automations
from flows.form import for_preset
from tinycats_core.errors import TinycatsError, report_error

FILE = Path(__file__).resolve().parents[1] / "prefect.yaml"
POOL = "local"


def main() -> int:
    """Deploy to the server that PREFECT_API_URL names. Returns the exit status."""
    try:
        with get_client(sync_client=True) as client:
            create_pool(client)
            automations.bring(client)
            for name, item in declared().items():
                if there := find(client, name):
                    update(client, there, item)
                else:
                    create(client, item)
    except TinycatsError as error:
        return report_error(error)
    return 0


@cache
def declared() -> dict[str, dict[str, Any]]:
    """Return the deployments of prefect.yaml by name, such as release-model/smoke. Raises TinycatsError."""
    if not FILE.is_file():
        raise TinycatsError(
            f"{FILE} is missing: `tinycats up` deploys from a clone. With the installed package alone, start a worker for a "
            f"server that has the deployments: prefect worker start --pool {POOL}"
        )
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    items = [item | {"pull": found["pull"]} for item in found["deployments"]]
    return {f"{item['entrypoint'].rpartition('.')[2].replace('_', '-')}/{item['name']}": item for item in items}


def create_pool(client: SyncPrefectClient) -> None:
    """Create the work pool if there is none. It runs as many flows at once as this machine has cores."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", concurrency_limit=max(2, os.cpu_count() or 1)))


def find(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    """Return the deployment of that name on the server, None if there is none."""
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def create(client: SyncPrefectClient, item: dict[str, Any]) -> None:
    """Create a deployment as prefect.yaml has it."""
    flow = load(item)
    client.create_deployment(
        client.create_flow(flow),
        name=item["name"],
        description=item["description"],
        parameters=item["parameters"],
        schedules=[DeploymentScheduleCreate.model_validate(schedule_of(one)) for one in item.get("schedules", [])],
        concurrency_limit=item.get("concurrency_limit"),
        work_pool_name=item["work_pool"]["name"],
        tags=item["tags"],
        enforce_parameter_schema=True,
        **code_of(flow, item),
    )


def update(client: SyncPrefectClient, there: DeploymentResponse, item: dict[str, Any]) -> None:
    """Tell a deployment how its flow is found now and which parameters it takes."""
    now = code_of(load(item), item)
    if {name: getattr(there, name) for name in now} != now:
        client.update_deployment(there.id, DeploymentUpdate.model_validate(now))


def load(item: dict[str, Any]) -> Flow[..., Any]:
    """Return the flow of a deployment."""
    return load_flow_from_entrypoint(item["entrypoint"], use_placeholder_flow=False)


def code_of(flow: Flow[..., Any], item: dict[str, Any]) -> dict[str, Any]:
    """Return what a deployment knows of its code: where a worker finds it, and which parameters it takes."""
    schema = parameter_schema(flow).model_dump(mode="json")
    if preset := item["parameters"].get("preset"):
        schema = for_preset(schema, preset)
    return {"entrypoint": item["entrypoint"], "pull_steps": item["pull"], "parameter_openapi_schema": schema}


def schedule_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return a schedule of prefect.yaml as the server takes it."""
    return {"slug": item["slug"], "schedule": {"cron": item["cron"], "timezone": item["timezone"]}}


if __name__ == "__main__":
    sys.exit(main())
