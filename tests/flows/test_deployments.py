"""prefect.yaml: every deployment names a flow and resolves its configuration. That it deploys is seen in test_serve.py."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import prefect.settings
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from deployments import deploy
from flows.release_model import release_model
from flows.train_classifier import train_classifier
from tinycats_core.config import ReleaseConfig
from tinycats_core.errors import TinycatsError
from tinycats_core.files import working_folder
from tinycats_core.presets import PRESETS, resolve

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: f"{deployment['entrypoint']}/{deployment['name']}")
def test_a_deployment_fits_its_flow_and_resolves(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    parameters = deployment["parameters"]
    assert parameters.keys() <= inspect.signature(flow.fn).parameters.keys()
    flow.validate_parameters(parameters)
    assert str(ROOT) not in str(deploy.code_of(flow, deploy.declared()[f"{flow.name}/{deployment['name']}"]))
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


@pytest.fixture(scope="module")
def smoke(prefect_server: str) -> Iterator[tuple[SyncPrefectClient, UUID]]:
    """A client, and the deployment release-model/smoke on its server."""
    with get_client(sync_client=True) as client:
        deploy.create_pool(client)
        deploy.create(client, deploy.declared()["release-model/smoke"])
        yield client, client.read_deployment_by_name("release-model/smoke").id


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"preset": "standard"}, "'standard' is not one of ['smoke']"),
        ({"overrides": {"train": {"steps": 0}}}, "0 is less than the minimum of 1"),
        ({"overrides": {"train": {"lr": "fast"}}}, "'fast' is not valid"),
        ({"overrides": {"train": {"stpes": 10}}}, "'stpes' was unexpected"),
        ({"overrides": {"trian": {}}}, "'trian' was unexpected"),
        ({"overrides": {"publish": {"name": "../x"}}}, "does not match"),
        ({"dry_run": "maybe"}, "is not of type 'boolean'"),
    ],
)
def test_a_wrong_parameter_is_refused_at_submission(
    parameters: dict[str, Any], said: str, smoke: tuple[SyncPrefectClient, UUID]
) -> None:
    client, deployment = smoke
    with pytest.raises(PrefectHTTPStatusError, match=re.escape(said)):
        client.create_flow_run_from_deployment(deployment, parameters=parameters)


def test_what_the_command_line_takes_is_taken(smoke: tuple[SyncPrefectClient, UUID], tiny: dict[str, Any]) -> None:
    client, deployment = smoke
    several = {"sample": {"guidance": 2.0, "guidance_interval": [0.2, 0.8]}, "train": {"ema_decays": 0.9, "passes": None}}
    for overrides in ({}, tiny, several, {"sample": {"guidance": [1, 2], "guidance_interval": [[0, 1]]}}):
        client.delete_flow_run(client.create_flow_run_from_deployment(deployment, parameters={"overrides": overrides}).id)


def test_the_form_describes_every_setting(smoke: tuple[SyncPrefectClient, UUID]) -> None:
    client, deployment = smoke
    made = client.read_deployment(deployment)
    parts = (made.parameter_openapi_schema or {})["properties"]["overrides"]["properties"]
    assert {name: [*part["properties"]] for name, part in parts.items()} == {
        name: [*field.annotation.model_fields]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        for name, field in ReleaseConfig.model_fields.items()
    }
    passes = "Over the training photos: fewer steps for few of them (preset: null)"
    assert parts["train"]["properties"]["passes"]["description"] == passes
    assert parts["train"]["properties"]["ema_decays"]["description"].startswith("One of them is shipped, as it was at")
    assert parts["model"]["properties"]["width"]["description"] == "(preset: 192)"


def test_the_versions_of_a_teams_server_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    services = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())["services"]
    assert services["server"]["image"] == f"prefecthq/prefect:{pinned['prefect']}-python3.11"
    assert yaml.safe_load((ROOT / "prefect.yaml").read_text())["prefect-version"] == pinned["prefect"]
    bases = [services["database"]["image"], *re.findall(r"^FROM (.*)$", (ROOT / "deployments" / "Dockerfile").read_text(), re.M)]
    assert all(re.fullmatch(r"(postgres|python):\d+(\.\d+)+(-\w+)+", base) for base in bases)
    settings = {name for service in services.values() for name in service["environment"] if name.startswith("PREFECT_")}
    assert [name for name in settings if not hasattr(prefect.settings, name)] == []


def test_a_missing_folder_of_a_worker_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINYCATS_FOLDER", raising=False)
    with pytest.raises(TinycatsError, match="TINYCATS_FOLDER is not set on "):
        working_folder()
    monkeypatch.setenv("TINYCATS_FOLDER", str(tmp_path / "none"))
    with pytest.raises(TinycatsError, match=f"TINYCATS_FOLDER is {tmp_path}/none, which is no folder on "):
        working_folder()
    monkeypatch.setenv("TINYCATS_FOLDER", str(tmp_path))
    assert working_folder() == {"directory": str(tmp_path)}


def test_the_server_of_the_installed_packages_imports() -> None:
    """Prefect's server does not start with every version of FastAPI and SQLAlchemy."""
    done = subprocess.run([sys.executable, "-c", "import prefect.server.api.server"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
