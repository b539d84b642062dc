"""What `tinycats up` brings to a server: the work pool, every deployment of prefect.yaml, and the detection of crashes.

What is there already keeps what a team has set: pauses, schedules, limits, descriptions, tags, parameters. It only learns
where the flows lie and which parameters they take. `prefect deploy --all` sets everything as prefect.yaml has it.

python -m deployments.deploy
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from deployments import automations
from tinycats_core.errors import TinycatsError, report_error

ROOT = Path(__file__).resolve().parents[1]
POOL = "local"


def main() -> int:
    """Deploy to the server that PREFECT_API_URL names. Returns the exit status."""
    os.chdir(ROOT)  # entrypoints are relative to it
    try:
        with get_client(sync_client=True) as client:
            create_pool(client)
            automations.bring(client)
            found = {name: find(client, name) for name in declared()}
            if missing := [name for name, deployment in found.items() if deployment is None]:
                create(missing)
            for name, deployment in found.items():
                if deployment is not None:
                    update(client, deployment, declared()[name]["entrypoint"])
    except TinycatsError as error:
        return report_error(error)
    return 0


def declared() -> dict[str, dict[str, Any]]:
    """Return the deployments of prefect.yaml by name, such as release-model/smoke."""
    items = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return {f"{item['entrypoint'].partition(':')[2].replace('_', '-')}/{item['name']}": item for item in items}


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


def create(names: list[str]) -> None:
    """Create deployments as prefect.yaml has them. Raises TinycatsError."""
    chosen = [argument for name in names for argument in ("--name", name)]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", *chosen]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise TinycatsError(f"prefect deploy failed (exit {done.returncode}):\n{done.stdout.strip()}")


def update(client: SyncPrefectClient, deployment: DeploymentResponse, entrypoint: str) -> None:
    """Tell a deployment where its flow lies now and which parameters it takes."""
    flow = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    now = {
        "entrypoint": entrypoint,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json"),
    }
    if {name: getattr(deployment, name) for name in now} != now:
        client.update_deployment(deployment.id, DeploymentUpdate.model_validate(now))


if __name__ == "__main__":
    sys.exit(main())
