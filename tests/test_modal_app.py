"""The bodies that run on Modal, run here; and what their container would hold."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copy2
from typing import Any

import pytest

from deployments import modal_app
from tinycats_core import remote
from tinycats_core.config import ComputeConfig, DataConfig, ModelConfig, TrainConfig
from tinycats_core.data import prepare
from tinycats_core.errors import ComputeError
from tinycats_core.files import sha256_of
from tinycats_core.records import Checkpoint, Dataset
from tinycats_core.training import read_log, train

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TRAIN = TrainConfig(steps=4, batch_size=4, warmup_steps=1, checkpoint_every=1, sample_every=4, log_every=1, ema_decays=(0.9, 0.5))

pytestmark = pytest.mark.filterwarnings("ignore:The train_generator function is executing locally")


class Volume:
    """Counts what a body asks of its volume."""

    def __init__(self) -> None:
        self.reloads = self.commits = 0
        self.interrupt_at = -1

    def reload(self) -> None:
        self.reloads += 1

    def commit(self) -> None:
        self.commits += 1
        if self.commits == self.interrupt_at:
            raise KeyboardInterrupt  # as Modal does to preempt


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DataConfig(source="toycats", image_size=16, toy_train_per_class=1, toy_val_per_class=1, toy_test_per_class=1)
    return prepare(config, tmp_path_factory.mktemp("data"))


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volume:
    """The app's volumes as folders of tmp_path, committed at each row of the log. Returns that of the outputs."""
    volume = Volume()
    monkeypatch.setattr(modal_app, "DATA", tmp_path / "data")
    monkeypatch.setattr(modal_app, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(modal_app, "data_volume", Volume())
    monkeypatch.setattr(modal_app, "outputs_volume", volume)
    monkeypatch.setattr(modal_app, "COMMIT_SECONDS", 0.0)
    return volume


@pytest.fixture
def request_(dataset: Dataset, tmp_path: Path) -> dict[str, Any]:
    """A request to train, whose data is on the volume."""
    folder = tmp_path / "data" / remote.data_folder(dataset.sha256)
    folder.mkdir(parents=True)
    copy2(dataset.path, folder)
    return {
        "run": "0123456789abcdef",
        "dataset": dataset.model_dump(mode="json", exclude={"path"}),
        "model": MODEL.model_dump(mode="json"),
        "train": TRAIN.model_dump(mode="json"),
        "device": "cpu",
        "processes": 1,
    }


def test_preempted_body_goes_on_and_ends_as_if_it_had_not_been(
    outputs: Volume, request_: dict[str, Any], dataset: Dataset, tmp_path: Path
) -> None:
    outputs.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        modal_app.train_generator.local(request_)
    run = tmp_path / "outputs" / "runs" / request_["run"]
    assert [row["step"] for row in read_log(run)] == [1, 2]
    assert not (run / "ema.safetensors").exists()

    result = modal_app.train_generator.local(request_)
    here = train(dataset, MODEL, TRAIN, tmp_path / "here", "cpu")
    assert Checkpoint.model_validate(result["checkpoint"]).in_folder(tmp_path / "here") == here
    weights = {"ema.safetensors", "ema-0.5.safetensors"}
    assert set(result["files"]) == weights | {"log.jsonl", "diary.jsonl", "samples/step-00000004.png"}
    assert all(sha256_of(run / name) == sha256 for name, sha256 in result["files"].items())
    assert [row["step"] for row in read_log(run)] == [1, 2, 3, 4]
    assert outputs.commits >= (2 + 1) + (2 + 1)  # at the rows and at the end of both attempts
    assert outputs.reloads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"model": {"width": 16, "colour": "black"}}, "does not know these settings; run `modal deploy"),
        ({"model": MODEL.model_copy(update={"num_classes": 4}).model_dump(mode="json")}, "13 classes"),
    ],
    ids=["no GPU", "older code", "other classes"],
)
def test_what_no_retry_can_mend_is_returned(
    outputs: Volume, request_: dict[str, Any], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in modal_app.train_generator.local(request_ | change)["error"]


def test_damaged_data_is_returned_with_the_remedy(outputs: Volume, request_: dict[str, Any], tmp_path: Path) -> None:
    path = next((tmp_path / "data").rglob("images.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    error = modal_app.train_generator.local(request_)["error"]
    assert "missing or damaged; run `modal volume rm -r tinycats-data datasets/" in error


def test_other_errors_are_raised_so_that_modal_retries(
    outputs: Volume, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: bus")

    monkeypatch.setattr("tinycats_core.training.train", broken)
    with pytest.raises(RuntimeError, match="bus"):
        modal_app.train_generator.local(request_)
    assert outputs.commits == 1  # what there is is kept for the next attempt


class Here(remote.ModalClient):
    """Modal without a remote: the body runs when it is called, on the folders that stand for the volumes."""

    result: dict[str, Any]

    def check_credentials(self) -> str:
        return "nowhere"

    def check_deployed(self) -> None:
        assert self.function is modal_app.train_generator

    def list_data(self, folder: str) -> dict[str, int]:
        return {}

    def upload(self, files: Mapping[str, Path]) -> None:
        for name, local in files.items():
            (modal_app.DATA / name).parent.mkdir(parents=True, exist_ok=True)
            copy2(local, modal_app.DATA / name)

    def spawn(self, request: dict[str, Any], compute: ComputeConfig) -> str:
        self.result = self.function.local(request)
        return "fc-0"

    def poll(self, call_id: str, seconds: float) -> dict[str, Any]:
        return self.result

    def read(self, path: str) -> Iterator[bytes]:
        yield (modal_app.OUTPUTS / path).read_bytes()


def test_entrypoint_trains_and_downloads(
    outputs: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "ModalClient", Here)
    overrides = """{
        "data": {"image_size": 16, "toy_train_per_class": 1, "toy_test_per_class": 1},
        "model": {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2},
        "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "log_every": 1}, "compute": {"device": "cpu"}
    }"""
    modal_app.train(preset="smoke", overrides=overrides)
    printed = capsys.readouterr().out.splitlines()
    path, _, sha256 = printed[-1].split()
    assert sha256_of(Path(path)) == sha256
    assert Path(path).is_relative_to(tmp_path / "home" / "modal")
    assert ['"step": 1' in printed[-3], '"step": 2' in printed[-2]] == [True, True]


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("enormous", "{}", "error: preset is 'enormous'; allowed: smoke"),
        ("smoke", '{"train": {"stepz": 3}}', "error: train.stepz is not a setting"),
        ("smoke", "{", "error: overrides is not JSON"),
    ],
)
def test_entrypoint_refuses_bad_settings(preset: str, overrides: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        modal_app.train(preset=preset, overrides=overrides)


# ---- the container


def test_image_takes_its_versions_from_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pins = modal_app.pinned(constraints)
    assert [pin.split("==")[0] for pin in pins] == list(modal_app.PACKAGES)
    assert set(pins) <= set(constraints.splitlines())
    text = "".join(line + "\n" for line in constraints.splitlines() if not line.startswith(("tqdm==", "numpy==")))
    with pytest.raises(ComputeError, match=r"constraints\.txt has no version of numpy, tqdm; add a line"):
        modal_app.pinned(text)


# Hides every module that the image does not have, then runs the real body: what it imports on the way, however late,
# must come from the packages of the image, what those require, the standard library, or tinycats_core.
CONTAINER = """
import importlib.metadata, json, re, sys
from pathlib import Path
import deployments.modal_app as modal_app

def closure(names):
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        left += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in requires if "extra ==" not in line]
    return found

image = closure([*modal_app.PACKAGES, "modal"])
owners = {module: dists for module, dists in importlib.metadata.packages_distributions().items() if "tinycats" not in dists}
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
here = {module for module, dists in owners.items() if image & {normal(dist) for dist in dists}}
here |= {"tinycats_core", *sys.stdlib_module_names}

class Image:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in here or top not in owners and top not in ("flows", "tasks", "tests"):
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

loaded = {name.split(".")[0] for name in sys.modules} & owners.keys() - here
assert not loaded, loaded
sys.meta_path[:] = [Image()]
for name in ("prefect", "huggingface_hub", "onnxruntime", "torch_fidelity", "pandas", "matplotlib", "flows", "tasks"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported: this is no test of the image")

class Volume:
    reload = commit = lambda self: None

modal_app.DATA, modal_app.OUTPUTS = Path(sys.argv[1], "data"), Path(sys.argv[1], "outputs")
modal_app.data_volume = modal_app.outputs_volume = Volume()
print(json.dumps(modal_app.train_generator.local(json.loads(sys.argv[2]))["files"]))
"""


def test_body_runs_on_what_the_image_holds(request_: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONTAINER, str(tmp_path), json.dumps(request_)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ema.safetensors" in json.loads(done.stdout)


def test_app_imports_nothing_of_the_project_but_the_core() -> None:
    tree = ast.walk(ast.parse((ROOT / "deployments" / "modal_app.py").read_text()))
    imported = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.split(".")[0] in ("flows", "tasks", "deployments")} == set()


@pytest.mark.parametrize("reference", ["deployments/modal_app.py", "deployments/modal_app.py::train"])
def test_help_needs_neither_network_nor_credentials(reference: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modal", "run", reference, "--help"],
        cwd=ROOT,
        env=os.environ | {"MODAL_SERVER_URL": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--preset" in done.stdout
    assert "--overrides" in done.stdout
