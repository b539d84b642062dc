"""Training that starts from a release: which one is found, what of it is kept, and what cannot be started from."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, loopback_hub

from deployments.fake_modal import Claims, FakeModal
from tinycats_core.compute import jobs
from tinycats_core.compute.remote import classifier_job, generator_job, train_on_modal
from tinycats_core.compute.volumes import upload, upload_base
from tinycats_core.config import CLASSES, ComputeConfig, PublishConfig, ReleaseConfig
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import CheckpointError, ComputeError, ConfigError, TinycatsError, TrainingError
from tinycats_core.files import read_json, sha256_of
from tinycats_core.generator.weights import load_generator, save_generator
from tinycats_core.records import Dataset, Release, ReleaseParts, Trained, Weights
from tinycats_core.release import base, bundle, hub, lineage, manifest
from tinycats_core.release.registry import publish_to_folder
from tinycats_core.training.base_weights import base_path, keep
from tinycats_core.training.state import Run

REPO = "someone/cats"
PLACES: dict[str, Callable[[Release], str]] = {
    "folder": lambda release: str(release.folder),
    "folder of its name": lambda release: str(release.folder.parent),
    "name": lambda release: release.name,
    "name and version": lambda release: f"{release.name}/{release.version}",
}


@pytest.fixture(autouse=True)
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))


@pytest.fixture
def published(built: Release, tmp_path: Path) -> Release:
    """A copy in a registry of its own, which a test may spoil."""
    folder = tmp_path / "registry" / built.name / built.version
    shutil.copytree(built.folder, folder)
    (tmp_path / "registry" / "registry.json").write_text('{"format": "tinycats-registry/1"}')
    return publish_to_folder(manifest.read_release(folder), None)


def starting(config: ReleaseConfig, text: str, registry: Path | None = None, **model: Any) -> ReleaseConfig:
    train = config.train.model_copy(update={"start_from": text})
    publish = PublishConfig(folder=registry or Path("nowhere"))
    return config.model_copy(
        update={"train": train, "publish": publish, "model": config.model.model_copy(update={"num_classes": 13, **model})}
    )


def changed(parts: dict[str, Any], **others: Any) -> dict[str, Any]:
    return parts | others


def registry_of(release: Release) -> Path:
    return release.folder.parent.parent


def base_of(config: ReleaseConfig) -> BaseRelease:
    assert config.train.base
    return config.train.base


@pytest.mark.parametrize("place", PLACES)
def test_a_release_is_found_wherever_it_is_named_and_its_digest_is_a_setting_then(
    place: str, published: Release, config: ReleaseConfig, checkpoint: Weights
):
    resolved = base.resolve(starting(config, PLACES[place](published), registry_of(published)))
    found = base_of(resolved)
    assert found == BaseRelease(published.name, published.version, checkpoint.sha256)
    assert base_path(found).read_bytes() == checkpoint.path.read_bytes()
    assert resolved.train.digest() != config.train.digest()
    shutil.rmtree(published.folder)  # its weights lie here
    assert base.resolve(resolved) == resolved


def test_without_a_base_nothing_is_looked_up(config: ReleaseConfig):
    assert base.resolve(config) is config
    assert config.train.base is None


def test_what_a_release_recorded_is_found_again_by_its_name(published: Release, config: ReleaseConfig):
    resolved = base.resolve(starting(config, published.name, registry_of(published)))
    base_path(base_of(resolved)).unlink()
    assert base.resolve(resolved) == resolved
    other = BaseRelease(published.name, published.version, "0" * 64)
    with pytest.raises(TinycatsError, match="has other weights, of the sha256"):
        base.resolve(starting(config, str(other), registry_of(published)))


def test_other_weights_in_the_same_place_are_another_training(published: Release, config: ReleaseConfig):
    given = starting(config, str(published.folder))
    before, weights = base.resolve(given), published.folder / "model.safetensors"
    network, header = load_generator(weights)
    save_generator(weights, {name: 2 * value for name, value in network.state_dict().items()}, header.model, header.classes, 7)
    sealed = read_json(published.path)
    sealed["files"][weights.name] = {"sha256": sha256_of(weights), "bytes": weights.stat().st_size}
    manifest.write_sealed(published.folder, sealed)
    after = base.resolve(given)
    assert base_of(after).sha256 == sha256_of(weights) != base_of(before).sha256
    assert after.train.digest() != before.train.digest()
    assert base_path(base_of(before)).is_file()  # which a training that is under way resumes with


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as running:
        monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
        yield running


def test_a_release_on_the_hub_is_downloaded_by_name(
    server: Hub, published: Release, config: ReleaseConfig, checkpoint: Weights, monkeypatch: pytest.MonkeyPatch
):
    hub.publish_to_hub(published, PublishConfig(name=published.name, to="hub", repo_id=REPO), None)
    resolved = base.resolve(starting(config, f"hub:{REPO}"))
    assert resolved.train.base == BaseRelease(f"hub:{REPO}", published.version, checkpoint.sha256)
    base_path(base_of(resolved)).unlink()
    assert base.resolve(resolved) == resolved  # by its version
    with pytest.raises(TinycatsError, match=r"^train\.start_from is hub:someone/dogs: it holds no release, or .* set HF_TOKEN\.$"):
        base.resolve(starting(config, "hub:someone/dogs"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TinycatsError, match=r"^train\.start_from is hub:someone/cats: .*HTTP 401.*set HF_TOKEN to it\.$"):
        base.resolve(starting(config, f"hub:{REPO}"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TinycatsError, match=r"^train\.start_from is hub:someone/cats: .*Check the network to http://127.0.0.1:9"):
        base.resolve(starting(config, f"hub:{REPO}"))


def future(release: Path) -> None:
    sealed = read_json(release / "release.json")
    manifest.write_sealed(release, sealed | {"format": "tinycats-release/3"})


def damaged(release: Path) -> None:
    content = bytearray((release / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (release / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, r"model\.safetensors has changed: its sha256 is"),
        (future, r"release\.json has the format tinycats-release/3, of a later tinycats; this one reads tinycats-release/1 or"),
        (lambda release: (release / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda release: (release / "release.json").unlink(), "there is no release, neither in that folder nor of that name in"),
    ],
)
def test_a_release_that_is_not_whole_is_one_line(
    spoil: Callable[[Path], Any], message: str, published: Release, config: ReleaseConfig, tmp_path: Path
):
    spoil(published.folder)
    with pytest.raises(TinycatsError, match=rf"^train\.start_from is {published.folder}: .*{message}") as raised:
        base.resolve(starting(config, str(published.folder)))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "home" / "bases").exists()


@pytest.mark.parametrize("text", ["x" * 300, "~nobody.here/cats", "a\0b", "cats@1@2", "not\nhere", "hub:", "hub:cats", "hub:a/b/c"])
def test_a_name_that_is_none_is_one_line(text: str, config: ReleaseConfig):
    with pytest.raises(TinycatsError, match=r"^train\.start_from is ") as raised:
        base.resolve(starting(config, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, r"another network: model\.image_size is 16 there and 32 here\. Set them as they are there"),
        ({"width": 64, "prediction": "v"}, "model.width is 32 there and 64 here; model.prediction is x there and v here"),
    ],
)
def test_another_network_is_refused_naming_what_differs(
    changes: dict[str, Any], message: str, published: Release, config: ReleaseConfig
):
    with pytest.raises(CheckpointError, match=message):
        base.resolve(starting(config, str(published.folder), **changes))


def test_classes_keep_the_embedding_of_their_name_and_new_ones_start_from_the_null_class(
    published: Release, config: ReleaseConfig, checkpoint: Weights
):
    resolved = base.resolve(starting(config, str(published.folder), num_classes=3))
    classes = ("Sphynx", "Tabby", "Bengal")
    train = resolved.train.model_copy(update={"augmentation": "full"})  # whose layer is not in the base
    images, labels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.arange(6) % 3
    run = Run.from_images(images, labels, classes, resolved.model, train, torch.device("cpu"))
    there = load_generator(checkpoint.path)[0].state_dict()
    rows = there["class_embed.weight"]
    wanted = torch.stack([rows[CLASSES.index("Sphynx")], rows[-1], rows[CLASSES.index("Bengal")], rows[-1]])
    assert torch.equal(run.weights["class_embed.weight"], wanted)
    assert all(torch.equal(run.weights[name], there[name]) for name in there if name != "class_embed.weight")
    assert all(torch.equal(run.emas[0.9999][name], run.weights[name]) for name in there)
    assert not any(value.any() for state in run.optimizer.state.values() for value in state.values())
    assert not run.weights["label_layer.weight"].any()


def test_a_class_that_the_base_knows_is_drawn_as_it_is_there(published: Release, config: ReleaseConfig, checkpoint: Weights):
    resolved = base.resolve(starting(config, str(published.folder), num_classes=2))
    images, labels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4) % 2
    run = Run.from_images(images, labels, ("Tabby", "Sphynx"), resolved.model, resolved.train, torch.device("cpu"))
    there = load_generator(checkpoint.path)[0]
    noise, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    with torch.no_grad():
        drawn = run.net.eval()(noise, t, torch.tensor([1, 0, 2]))  # known, new, null
        expected = there(noise, t, torch.tensor([CLASSES.index("Sphynx"), len(CLASSES), len(CLASSES)]))
    assert torch.equal(drawn, expected)


def test_weights_that_were_lost_since_are_no_start_at_random(published: Release, config: ReleaseConfig):
    resolved = base.resolve(starting(config, str(published.folder)))
    images, labels = torch.zeros(13, 3, 16, 16, dtype=torch.uint8), torch.arange(13)
    base_path(base_of(resolved)).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="are damaged or gone"):
        Run.from_images(images, labels, CLASSES, resolved.model, resolved.train, torch.device("cpu"))
    unresolved = config.train.model_copy(update={"start_from": "cats"})
    with pytest.raises(ConfigError, match="which has not been resolved"):
        Run.from_images(images, labels, CLASSES, resolved.model, unresolved, torch.device("cpu"))


def test_the_weights_travel_with_a_training_on_modal(
    published: Release, config: ReleaseConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    resolved = base.resolve(starting(config, str(published.folder)))
    job, modal = generator_job(dataset, resolved.model, resolved.train), FakeModal(tmp_path / "modal")
    assert job.run != generator_job(dataset, resolved.model, config.train).run
    found = base_of(resolved)
    assert job.base == found
    upload_base(modal, found)
    with monkeypatch.context() as patch:
        patch.setattr(modal, "upload", lambda files: pytest.fail("uploaded again"))
        upload_base(modal, found)

    upload(modal, dataset)
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "container"))
    monkeypatch.setattr(modal, "spawn", lambda function, request, compute: "fc-0")
    site = jobs.Site(
        modal.root / "data", modal.root / "outputs", lambda: None, lambda must: None, "fc-0", Claims(tmp_path), lambda call: True
    )

    def work(*given: object) -> Trained:
        raise TrainingError(f"began with {base_path(found).name}")

    request = job.request(ComputeConfig(device="cpu"))
    assert jobs.perform(request, site, work) == jobs.Failed(error=f"began with {found.sha256}.safetensors")
    shutil.rmtree(tmp_path / "container")
    (modal.root / "data" / jobs.base_file(found)).write_bytes(b"damaged")
    result = jobs.perform(request, site, work)
    assert isinstance(result, jobs.Failed)
    assert re.search(
        r"have the sha256 \w+… instead of .*; remove bases from the data volume, and run the same command", result.error
    )


def test_nothing_but_a_training_that_starts_from_a_release_needs_weights(config: ReleaseConfig, dataset: Dataset, tmp_path: Path):
    assert generator_job(dataset, config.model, config.train).base is None
    assert classifier_job(dataset, config.classifier).base is None
    jobs.fetch_base({"classifier": {}}, tmp_path)


def test_a_call_takes_the_weights_along(
    published: Release, config: ReleaseConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    resolved = base.resolve(starting(config, str(published.folder)))
    modal = FakeModal(tmp_path / "modal")

    def spawn(function: str, request: jobs.Request, compute: ComputeConfig) -> str:
        raise ComputeError(f"called with {[path.name for path in (modal.root / 'data' / 'bases').iterdir()]}")

    monkeypatch.setattr(modal, "spawn", spawn)
    job = generator_job(dataset, resolved.model, resolved.train)
    with pytest.raises(ComputeError, match=f"called with .*{base_of(resolved).sha256}"):
        train_on_modal(job, ComputeConfig(where="modal", gpu="L4"), tmp_path / "run", client=modal)


def test_the_base_is_in_lineage_and_card(
    published: Release, config: ReleaseConfig, parts: dict[str, Any], tmp_path: Path, checkpoint: Weights
):
    start = BaseRelease(f"hub:{REPO}", published.version, checkpoint.sha256)
    keep(checkpoint.path, start)
    settings = starting(config, str(start))
    plain = bundle.build(tmp_path / "plain", ReleaseParts(**parts))
    trained = bundle.build(tmp_path / "made", ReleaseParts(**changed(parts, config=settings)))
    assert trained.version != plain.version
    made = read_json(trained.path)
    assert made["parents"]["base"]["sha256"] == checkpoint.sha256
    assert read_json(plain.path)["parents"]["base"] is None
    card = (trained.folder / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert f"started from the weights of `hub:{REPO}`, version `{published.version}`" in card
    assert "started from the weights" not in (plain.folder / "README.md").read_text()
    assert lineage.inspect(plain.folder)["wrong"] == []
    # these weights do not say that they came from there; the next ones do
    assert "weights: base in model.safetensors is nothing" in lineage.inspect(trained.folder)["wrong"][0]
    network, header = load_generator(checkpoint.path)
    facts = header.facts | {"base": checkpoint.sha256}
    weights = save_generator(tmp_path / "ema.safetensors", network.state_dict(), header.model, header.classes, 7, facts)
    choice = parts["choice"].model_copy(update={"weights": weights})
    honest = bundle.build(tmp_path / "honest", ReleaseParts(**changed(parts, config=settings, choice=choice)))
    found = {check.what: check.holds for check in lineage.check(honest) if check.link == "weights"}
    assert found["base in release_config.json"]
    assert found["base in model.safetensors"]
