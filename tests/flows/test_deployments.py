"""prefect.yaml as a user meets it: every deployment deploys, names a flow, and resolves its configuration."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.flows import load_flow_from_entrypoint

from flows.release_model import release_model
from flows.train_classifier import train_classifier
from tinycats_core.presets import PRESETS, resolve

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
NAMES = {
    *(f"release-model/{preset}" for preset in PRESETS),
    "nightly-eval/nightly",
    "evaluate-model/published",
    "train-classifier/smoke",
}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: f"{deployment['entrypoint']}/{deployment['name']}")
def test_a_deployment_fits_its_flow_and_resolves(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    parameters = deployment["parameters"]
    assert parameters.keys() <= inspect.signature(flow.fn).parameters.keys()
    flow.validate_parameters(parameters)
    if "preset" in parameters:
        config = resolve(parameters["preset"], parameters["overrides"])
        assert config.publish.name == f"tinycats-{deployment['name']}"


def test_the_presets_are_listed_everywhere_as_they_are() -> None:
    *others, last = PRESETS
    sentence = f"preset: {', '.join(others)} or {last}."
    for flow in (release_model, train_classifier):
        assert sentence in (inspect.getdoc(flow.fn) or "")
    deployed = [item["parameters"]["preset"] for item in DEPLOYMENTS if "release_model" in item["entrypoint"]]
    assert deployed == list(PRESETS)


def test_two_releases_by_one_deployment_never_run_at_the_same_time() -> None:
    releases = [item for item in DEPLOYMENTS if "release_model" in item["entrypoint"]]
    assert [item["concurrency_limit"] for item in releases] == [1] * len(PRESETS)


def test_the_server_of_the_installed_packages_imports() -> None:
    done = subprocess.run([sys.executable, "-c", "import prefect.server.api.server"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_deployment_deploys(prefect_server: str) -> None:
    """With a FastAPI that Prefect does not know, the second deployment is answered with a 422."""
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    for command in (["work-pool", "create", "local", "--type", "process"], ["deploy", "--all"]):
        prefect = [sys.executable, "-m", "prefect", "--no-prompt", *command]
        done = subprocess.run(prefect, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        deployed = {f"{flows[item.flow_id]}/{item.name}": item for item in client.read_deployments()}
    assert deployed.keys() == NAMES
    assert [item.schedule.model_dump()["cron"] for item in deployed["nightly-eval/nightly"].schedules] == ["0 3 * * *"]
    for item in deployed.values():
        assert item.pull_steps
        assert item.pull_steps[0]["prefect.deployments.steps.set_working_directory"] == {"directory": str(ROOT)}
