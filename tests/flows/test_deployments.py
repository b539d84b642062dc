"""prefect.yaml: every deployment names a flow and resolves its configuration. That it deploys is seen in test_serve.py."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.release_model import release_model
from flows.train_classifier import train_classifier
from tinycats_core.presets import PRESETS, resolve

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


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
        assert parameter_schema(flow).properties["preset"]["enum"] == list(PRESETS)
    deployed = [item["parameters"]["preset"] for item in DEPLOYMENTS if "release_model" in item["entrypoint"]]
    assert deployed == list(PRESETS)


def test_two_releases_by_one_deployment_never_run_at_the_same_time() -> None:
    releases = [item for item in DEPLOYMENTS if "release_model" in item["entrypoint"]]
    assert [item["concurrency_limit"] for item in releases] == [1] * len(PRESETS)


def test_the_server_of_the_installed_packages_imports() -> None:
    """Prefect's server does not start with every version of FastAPI and SQLAlchemy."""
    done = subprocess.run([sys.executable, "-c", "import prefect.server.api.server"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
