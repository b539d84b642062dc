"""The Modal app: its functions called here, its image, and what its container would hold."""

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from shutil import copy2
from typing import Any

import modal
import pytest
from modal import exception as modal_errors

from deployments import modal_app
from deployments.fake_modal import Claims, FakeModal, Mounted
from tasks import preflight
from tinycats_core.compute import jobs, remote
from tinycats_core.config import ClassifierConfig, ComputeConfig, DataConfig, ModelConfig, TrainConfig
from tinycats_core.data.preparation import prepare
from tinycats_core.errors import ComputeError
from tinycats_core.files import sha256_of
from tinycats_core.records import Dataset, Weights
from tinycats_core.tensors import read_safetensors
from tinycats_core.training.run_folder import read_log

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TRAIN = TrainConfig(steps=2, batch_size=4, warmup_steps=1, checkpoint_every=1, sample_every=2, log_every=1, ema_decays=(0.9,))

pytestmark = pytest.mark.filterwarnings("ignore:The .* function is executing locally")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    config = DataConfig(source="toycats", image_size=16, toy_train_per_class=2, toy_val_per_class=1, toy_test_per_class=2)
    return prepare(config, tmp_path_factory.mktemp("data"))


@pytest.fixture
def request_(dataset: Dataset, tmp_path: Path) -> jobs.Request:
    """A request to train, whose data is on the volume that is the folder `data`."""
    folder = tmp_path / "data" / jobs.data_folder(dataset.sha256)
    folder.mkdir(parents=True)
    copy2(dataset.path, folder)
    classifier = ClassifierConfig(backbone="mobilenet_v3_small", epochs=1, batch_size=8).model_dump(mode="json")
    return remote.generator_job(dataset, MODEL, TRAIN).request(ComputeConfig(device="cpu")) | {"classifier": classifier}


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The app as in a container: volumes mounted below tmp_path/container, committed to tmp_path. Returns tmp_path."""
    for name in ("data", "outputs", "claims"):
        (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.setattr(modal_app, "DATA", tmp_path / "container" / "data")
    monkeypatch.setattr(modal_app, "OUTPUTS", tmp_path / "container" / "outputs")
    monkeypatch.setattr(modal_app, "data_volume", Mounted(tmp_path / "data", modal_app.DATA))
    monkeypatch.setattr(modal_app, "outputs_volume", Mounted(tmp_path / "outputs", modal_app.OUTPUTS))
    monkeypatch.setattr(modal_app, "claims", Claims(tmp_path / "claims"))
    return tmp_path


@pytest.mark.parametrize(
    ("function", "made"), [("train_generator", "ema.safetensors"), ("train_classifier", "classifier.safetensors")]
)
def test_bodies_leave_their_work_on_the_volume(function: str, made: str, request_: jobs.Request, mounted: Path) -> None:
    result = getattr(modal_app, function).local(request_)
    run = mounted / "outputs" / jobs.run_folder(request_["run"])
    assert made in result["files"]
    assert all(sha256_of(run / name) == sha256 for name, sha256 in result["files"].items())
    assert json.loads((run / "result.json").read_text()) == result


def test_data_that_came_after_the_container_began_is_seen(request_: jobs.Request, mounted: Path, dataset: Dataset) -> None:
    (folder,) = (mounted / "data" / "datasets").iterdir()
    aside = folder.rename(mounted / "aside")
    modal_app.data_volume.reload()
    aside.rename(folder)
    assert jobs.check(modal_app.DATA, dataset.sha256)["data"] is None
    found = modal_app.check.local(dataset.sha256)
    assert (found["revision"], found["data"]) == (jobs.revision(), dataset.sha256)
    assert found["app"] == jobs.digest_of_files(preflight.APP_FILES)


@pytest.fixture
def failing(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes of which the outputs cannot be committed."""

    def commit() -> None:
        raise modal_errors.ServiceError("overloaded")

    monkeypatch.setattr(modal_app.outputs_volume, "commit", commit)


@pytest.mark.usefixtures("failing")
def test_a_commit_that_fails_stops_no_training_and_loses_no_result(
    request_: jobs.Request, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "KEEP_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="ServiceError: overloaded"):  # so that Modal tries again
        modal_app.train_generator.local(request_)
    assert [row["step"] for row in read_log(modal_app.OUTPUTS / jobs.run_folder(request_["run"]))] == [1, 2]
    assert "the outputs were not committed: overloaded" in caplog.text


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("told", [False, True], ids=["full", "full and preempted"])
def test_a_commit_that_fails_hides_neither_an_error_nor_a_signal(
    told: bool, request_: jobs.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*given: Any) -> Weights:
        if told:
            signal.raise_signal(signal.SIGINT)
            raise ChildProcessError("a worker is gone")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    monkeypatch.setattr(jobs, "train_generator", work)
    try:
        if told:
            with pytest.raises(KeyboardInterrupt):
                modal_app.train_generator.local(request_)
        else:
            assert "the outputs volume is full" in modal_app.train_generator.local(request_)["error"]
    finally:
        signal.signal(signal.SIGINT, before)


class Here(FakeModal):
    """A FakeModal without containers: the function that the app gave is called when it is spawned."""

    result: jobs.Result

    def spawn(self, function: str, request: jobs.Request, compute: ComputeConfig) -> str:
        self.result = jobs.parse_result(self.functions[function].local(request))
        return "fc-0"

    def poll(self, call_id: str, seconds: float) -> jobs.Result:
        return self.result


def test_entrypoint_trains_and_downloads(
    mounted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(functions: Mapping[str, Any]) -> Here:
        client = Here(mounted)
        client.functions = functions
        return client

    monkeypatch.setenv("TINYCATS_HOME", str(mounted / "home"))
    monkeypatch.setattr(remote, "ModalClient", connect)
    overrides = """{
        "data": {"image_size": 16, "toy_train_per_class": 1, "toy_test_per_class": 1},
        "model": {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2},
        "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "log_every": 1}, "compute": {"device": "cpu"}
    }"""
    modal_app.train(preset="smoke", overrides=overrides)
    printed = capsys.readouterr().out.splitlines()
    path, _, sha256 = printed[-1].split()
    assert sha256_of(Path(path)) == sha256
    assert Path(path).is_relative_to(mounted / "home" / "modal")
    assert ['"step": 1' in printed[-3], '"step": 2' in printed[-2]] == [True, True]


class Mapped:
    """A function of the app as it answers without Modal; keeps what it is asked."""

    def __init__(self, body: Any):
        self.body, self.options, self.asked = body, {}, []

    def with_options(self, **options: Any) -> "Mapped":
        self.options = options
        return self

    def starmap(self, given: list[tuple[Any, ...]]) -> list[Any]:
        self.asked = given
        return [self.body(*arguments) for arguments in given]

    def remote(self, *given: Any) -> Any:
        return self.body(*given)


def test_images_drawn_in_shards_are_those_drawn_at_once(
    request_: jobs.Request, mounted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = {**request_["model"], "prediction": "v"}  # which draws its own noise
    modal_app.train_generator.local(request_ | {"model": untrained})
    monkeypatch.setattr(remote, "ModalClient", lambda: FakeModal(mounted))
    drawer = Mapped(modal_app.generate_samples.local)
    monkeypatch.setattr(modal_app, "generate_samples", drawer)
    compute = {"gpu": "L4", "device": "cpu", "secrets": ["proxy"]}
    overrides = {"compute": compute, "sample": {"batch_size": 4, "steps": 2, "guidance": 2.0}}
    for shards in (1, 3):
        modal_app.generate(request_["run"], 2, shards, "smoke", json.dumps(overrides), str(mounted / f"in-{shards}"))
        assert len(drawer.asked) == shards
    assert [repr(secret) for secret in drawer.options.pop("secrets")] == ["modal.Secret.from_name('proxy')"]
    assert drawer.options == {"gpu": "L4", "cpu": (2.0, 2.0), "memory": (16384, 16384), "region": None}
    whole, parts = (read_safetensors(mounted / f"in-{shards}.safetensors", "samples")[0] for shards in (1, 3))
    assert whole["labels"].tolist() == [number // 2 for number in range(26)]
    assert whole["images"].shape == (26, 3, 16, 16)
    assert (whole["images"] == parts["images"]).all()
    assert whole["images"].float().std() > 1
    assert "26 images in 3 shards" in capsys.readouterr().out


def test_data_prepared_there_is_what_would_be_uploaded(
    mounted: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modal_app, "prepare_data", Mapped(modal_app.prepare_data.local))
    settings = {"image_size": 16, "toy_train_per_class": 2, "toy_val_per_class": 1, "toy_test_per_class": 2}
    overrides = {"data": settings, "model": {"image_size": 16}}
    modal_app.prepare("smoke", json.dumps(overrides))
    assert capsys.readouterr().out.strip() == dataset.sha256
    assert sha256_of(mounted / "data" / jobs.data_folder(dataset.sha256) / "images.safetensors") == dataset.sha256
    with pytest.raises(SystemExit, match=r"data\.source is 'folder', and the folder is here"):
        modal_app.prepare("photos")


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("enormous", "{}", "error: preset is 'enormous'; allowed: smoke"),
        ("smoke", '{"train": {"stepz": 3}}', "error: train.stepz is not a setting"),
        ("smoke", "{", "error: overrides is not JSON"),
        ("smoke", '{"compute": {"max_cost_usd": 1e-9}}', r"error: compute\.max_cost_usd is 1e-09 but the training will cost \$"),
    ],
)
def test_entrypoint_refuses_bad_settings(preset: str, overrides: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        modal_app.train(preset=preset, overrides=overrides)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"run": "typo"}, r"error: --run is 'typo', but there is no runs/typo/run\.json on the outputs volume; see `modal"),
        ({"shards": 0}, "error: --shards is 0; give 1 or more"),
        ({"per_class": 0}, "error: --per-class is 0; give 1 or more"),
    ],
)
def test_drawing_refuses_what_cannot_be_drawn(
    wrong: dict[str, Any], message: str, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ModalClient", lambda: FakeModal(mounted))
    monkeypatch.setattr(modal_app, "generate_samples", Mapped(lambda *given: pytest.fail("paid for")))
    with pytest.raises(SystemExit, match=message):
        modal_app.generate(**{"run": "typo", "preset": "smoke"} | wrong)


# ---- the container


def requirements(names: set[str]) -> set[str]:
    """Return the normal names of packages and of all that they require on this platform, as installed here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        left += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in required if "extra ==" not in line]  # pyright: ignore
    return found


def test_image_takes_its_versions_from_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    pins = modal_app.pinned(constraints)
    assert [pin.split("==")[0] for pin in pins] == list(modal_app.PACKAGES)
    assert set(pins) <= set(constraints.splitlines())
    text = "".join(line + "\n" for line in constraints.splitlines() if not line.startswith(("tqdm==", "numpy==")))
    with pytest.raises(ComputeError, match=r"constraints\.txt has no version of numpy, tqdm; add a line"):
        modal_app.pinned(text)


def test_image_installs_exactly_the_pinned_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Image:
        def __getattr__(self, name: str) -> Any:
            def record(*args: Any, **kwargs: Any) -> "Image":
                asked.append((name, args, kwargs))
                return self

            return record

    monkeypatch.setattr(modal.Image, "debian_slim", lambda python_version: Image())
    modal_app.make_image()
    (copied, installed, sources) = asked
    assert copied == ("add_local_file", (ROOT / "constraints.txt", "/constraints.txt"), {"copy": True})
    assert installed[0] == "uv_pip_install"
    assert installed[2] == {"extra_options": "--constraint /constraints.txt"}
    assert sources == ("add_local_python_source", ("tinycats_core",), {})
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in (line.partition("==") for line in lines)}
    for name in requirements({pin.split("==")[0] for pin in installed[1]}):
        assert name in versions, f"{name} would be installed in any version"
        assert metadata.version(name).split("+")[0] == versions[name], name  # the set is one that works together


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
for name in ("prefect", "huggingface_hub", "onnxruntime", "pandas", "matplotlib", "flows", "tasks"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported: this is no test of the image")

class Volume:
    reload = commit = lambda self: None

class Claims(dict):
    def put(self, key, value, skip_if_exists):
        return self.setdefault(key, value) == value

modal_app.DATA, modal_app.OUTPUTS = Path(sys.argv[1], "data"), Path(sys.argv[1], "outputs")
modal_app.data_volume = modal_app.outputs_volume = Volume()
modal_app.claims = Claims()
generator, classifier = json.loads(sys.argv[2])
modal_app.check.local(generator["dataset"]["sha256"])
made = modal_app.train_generator.local(generator)["files"] | modal_app.train_classifier.local(classifier)["files"]
modal_app.generate_samples.local(generator["run"], [0, 1, 2], 0, {"steps": 1}, "cpu")
judged = {"extractor": "breed", "samples": 26, "kid_subsets": 2}
report = modal_app.evaluate.local(generator["run"], {"steps": 1}, judged, "cpu", classifier["run"])
digest = modal_app.prepare_data.local({"source": "toycats", "image_size": 16, "toy_train_per_class": 1, "toy_test_per_class": 1})
print(json.dumps([*made, *report["metrics"], digest]))
"""


def test_bodies_run_on_what_the_image_holds(request_: jobs.Request, tmp_path: Path) -> None:
    requests = json.dumps([request_, request_ | {"run": "fedcba9876543210"}])
    done = subprocess.run(
        [sys.executable, "-c", CONTAINER, str(tmp_path), requests],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *made, digest = json.loads(done.stdout.splitlines()[-1])
    assert {"ema.safetensors", "classifier.safetensors", "kid_breed", "breed_accuracy"} <= set(made)
    assert (tmp_path / "data" / jobs.data_folder(digest) / "manifest.json").is_file()


def test_app_imports_nothing_of_the_project_but_the_core() -> None:
    tree = ast.walk(ast.parse((ROOT / "deployments" / "modal_app.py").read_text()))
    imported = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name and name.split(".")[0] in ("flows", "tasks", "deployments")} == set()


@pytest.mark.parametrize("name", ["train", "generate"])
def test_help_needs_neither_network_nor_credentials(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modal", "run", f"deployments/modal_app.py::{name}", "--help"],
        cwd=ROOT,
        env=os.environ | {"MODAL_SERVER_URL": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--preset" in done.stdout
    assert "--overrides" in done.stdout
