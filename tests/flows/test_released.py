"""What is done with a finished release: the nightly evaluation, an evaluation alone; and the classifier alone."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.events.clients import AssertingPassthroughEventsClient
from prefect.events.worker import EventsWorker

from flows import cli
from flows import nightly_eval as nightly
from flows import train_classifier as alone
from flows.evaluate_model import evaluate_model
from flows.nightly_eval import nightly_eval
from flows.train_classifier import train_classifier
from tinycats_core.data import toy_drawing
from tinycats_core.errors import ConfigError, EvaluationError, RegistryError, ReleaseRejected, TinycatsError
from tinycats_core.files import home, read_json, write_json
from tinycats_core.records import Release, Weights
from tinycats_core.release import figures, manifest, shipped

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def latest(released: Release) -> Path:
    return released.folder.parent / "latest"


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Return the payloads of the events of a name that were sent to the server, which keeps none."""
    worker = EventsWorker.instance(AssertingPassthroughEventsClient)
    monkeypatch.setattr(EventsWorker, "instance", lambda *_: worker)

    def of(name: str) -> list[dict[str, Any]]:
        worker.drain()
        sent = [event for client in AssertingPassthroughEventsClient.all for event in client.events]
        return [event.payload for event in sent if event.event == name]

    yield of
    worker.drain()
    AssertingPassthroughEventsClient.reset()


def resealed(latest: Path, file: str, value: Any) -> None:
    """Change a JSON file of a release and its manifest with it, as nobody should."""
    folder = latest.resolve()
    write_json(folder / file, value)
    made = read_json(folder / "release.json")
    (folder / "release.json").unlink()
    manifest.seal(folder, made["name"], made["version"], made["key"], made["parents"])


def test_the_records_of_a_release_are_those_of_its_files(latest: Path) -> None:
    release = manifest.read_release(latest)
    for record in (shipped.generator(release), shipped.classifier(release), shipped.onnx(release)):
        assert record
        record.verify()
    measured = read_json(latest / "metrics.json")["onnx"]["onnx-int8"]
    assert shipped.onnx_report(release).metrics == measured["metrics"]
    assert shipped.config(release, {"train": {"seed": 5}}).train.seed == 5
    chosen = read_json(latest / "sweep.json")["sample"]
    assert shipped.config(release).sample.single().model_dump(mode="json") == chosen
    assert shipped.config(release, {"sample": {"guidance": 2}}).sample.single().guidance == 2
    assert read_json(latest / "release_config.json")["sample"]["guidance"] == [1.0, 1.5]  # as it was asked for


def test_a_release_from_before_there_was_a_choice_has_its_guidance_in_its_configuration(latest: Path) -> None:
    folder = latest.resolve()
    options = shipped.config(manifest.read_release(latest)).sample
    settings = read_json(folder / "release_config.json")
    settings["sample"] |= {"guidance": 1.75, "guidance_interval": [0.2, 1]}
    (folder / "sweep.json").unlink()
    resealed(latest, "release_config.json", settings)
    assert shipped.sample(manifest.read_release(latest), options) == options.at(1.75, (0.2, 1))


@pytest.mark.parametrize(("flip", "augmentation"), [(True, "basic"), (False, "none")])
def test_a_release_from_before_augmentation_was_a_setting_has_its_flips(latest: Path, flip: bool, augmentation: str) -> None:
    settings = read_json(latest / "release_config.json")
    del settings["train"]["augmentation"]
    settings["train"]["flip"] = flip
    resealed(latest, "release_config.json", settings)
    assert shipped.config(manifest.read_release(latest)).train.augmentation == augmentation


def test_several_guidances_for_a_finished_release_are_refused_before_any_stage(
    latest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    for flow in (evaluate_model, nightly_eval):
        with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="give one of each"):
            flow(str(latest), {"sample": {"guidance": [1, 2]}})
    assert "done in" not in caplog.text


def test_the_nightly_evaluation_measures_anew_but_once(latest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"evaluate": {"tolerance": 2.5}}  # a configuration that no other test of this session has evaluated
    assert nightly_eval(str(latest), own).promoted
    assert "nothing to do" not in capsys.readouterr().out.split("tiny ")[-1]
    assert nightly_eval(str(latest), own).promoted
    assert "nothing to do: no stage executed" in capsys.readouterr().out.split("tiny ")[-1]


def test_a_release_that_went_on_from_another_training_is_evaluated_without_it(latest: Path) -> None:
    made = read_json(latest / "release_config.json")
    resealed(latest, "release_config.json", {**made, "train": {**made["train"], "resume_from": "gone"}})
    assert nightly_eval(str(latest)).promoted


def test_the_figures_of_a_release_are_computed_again(latest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(latest), "--figures", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    recorded = read_json(latest / "metrics.json")["onnx"]["onnx-int8"]["metrics"]
    assert {row["metric"]: row["now"] for row in result["figures"]} == recorded
    assert {row["difference"] for row in result["figures"]} == {0.0, None}
    assert {check["holds"] for check in result["lineage"]} == {True}
    assert cli.main(["verify", str(latest), "--figures"]) == 0
    assert "equal to the last bit: same processor, threads and versions" in capsys.readouterr().out


def test_a_figure_that_is_not_what_the_release_says_is_named(latest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = read_json(latest / "metrics.json")
    of_int8 = metrics["onnx"]["onnx-int8"]["metrics"]
    of_int8 |= {"recall": of_int8["recall"] + 0.4, "coverage": of_int8["coverage"] + 1e-9, "spread": of_int8["spread"] * 1.2}
    resealed(latest, "metrics.json", metrics)
    found = {row.metric for row in figures.measure_again(manifest.read_release(latest)) if not row.holds}
    assert found == {"recall", "coverage", "spread"}
    monkeypatch.setattr(figures, "made_like_here", lambda release: False)  # another machine: chance is allowed for
    rows = {row.metric: row for row in figures.measure_again(manifest.read_release(latest))}
    assert {metric for metric, row in rows.items() if not row.holds} == {"recall", "spread"}
    assert rows["kid_breed"].allowed > 0


def test_one_changed_byte_ends_the_nightly_evaluation_before_any_stage(latest: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx = latest.resolve() / "denoiser-int8.onnx"
    content = bytearray(onnx.read_bytes())
    content[len(content) // 2] ^= 1
    onnx.write_bytes(content)
    with caplog.at_level(logging.INFO), pytest.raises(RegistryError, match="denoiser-int8.onnx has changed"):
        nightly_eval(str(latest))
    assert "done in" not in caplog.text


def test_a_release_that_is_worse_than_it_says_is_found(latest: Path, emitted: Callable[[str], list[dict[str, Any]]]) -> None:
    metrics = read_json(latest / "metrics.json")
    for name in metrics["onnx"]["onnx-int8"]["metrics"]:
        if name.startswith("kid"):
            metrics["onnx"]["onnx-int8"]["metrics"][name] = 0.0 if name.endswith("_std") else -1.0
    resealed(latest, "metrics.json", metrics)
    with pytest.raises(ReleaseRejected, match="kid"):
        nightly_eval(str(latest))
    assert "not_worse" in emitted("tinycats.release.regressed")[0]


def test_numbers_of_other_images_are_not_compared(latest: Path) -> None:
    with pytest.raises(EvaluationError, match="the images have changed"):
        nightly_eval(str(latest), {"data": {"seed": 9}})


def test_a_place_without_a_release_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nightly.main([str(tmp_path / "nothing")]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "does not exist" in error


def test_a_release_is_evaluated_alone_and_gives_its_own_numbers(latest: Path) -> None:
    report = evaluate_model(str(latest))
    assert report.metrics == read_json(latest / "metrics.json")["candidate"]["metrics"]
    state = evaluate_model(str(latest), return_state=True)  # everything from the cache, and shown all the same
    assert state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        assert {artifact.key for artifact in client.read_artifacts(artifact_filter=of_this_run)} == {"fidelity", "sample-grid"}
    other = evaluate_model(str(latest), {"sample": {"seed": 5}})
    assert other.metrics != report.metrics


def test_the_classifier_is_trained_alone(tiny: dict[str, Any]) -> None:
    own = {**tiny, "classifier": {**tiny["classifier"], "epochs": 1, "seed": 7}}  # which no other test has trained
    state = train_classifier("smoke", own, return_state=True)
    classifier = state.result()
    assert isinstance(classifier, Weights)
    report = read_json(classifier.verify().path.with_name("report.json"))
    run_id = state.state_details.flow_run_id
    assert run_id
    with get_client(sync_client=True) as client:
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        shown = {artifact.key: str(artifact.data) for artifact in client.read_artifacts(artifact_filter=of_this_run)}
    rows = json.loads(shown["classifier-classes"], parse_constant=pytest.fail)  # no NaN
    assert [(row["class"], row["support"]) for row in rows] == [(row["class"], row["support"]) for row in report["classes"]]
    assert shown["classifier-confusion"].startswith("![Held-out images of each class")
    assert {row["metric"] for row in json.loads(shown["onnx-classifier"])} >= {"relative_error", "same_class"}
    with pytest.raises(TinycatsError, match="classifier.epochs is 0"):
        train_classifier("smoke", {"classifier": {"epochs": 0}})


def test_the_classifier_is_not_trained_on_a_modal_without_credentials(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(TinycatsError, match="no Modal credentials"):
        train_classifier("smoke", {"compute": {"where": "modal"}})
    assert "done in" not in caplog.text


def test_the_classifier_of_ones_own_photos_is_trained_from_the_command_line_and_needs_no_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TINYCATS_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    rng = np.random.default_rng(0)
    for label, name in enumerate(("tabby", "tiger")):
        (tmp_path / "cats" / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.array(toy_drawing.draw(label, rng, 40))).save(tmp_path / "cats" / name / f"{number}.png")
    overrides = {"data": {"folder": str(tmp_path / "cats")}, "classifier": {"epochs": 1}}
    assert alone.main(["--preset", "photos", "--overrides", json.dumps(overrides)]) == 0
    files = [path for path in home().glob("classifier/*/report.json") if read_json(path)["classes"][0]["class"] == "tabby"]
    assert len(files) == 1
    capsys.readouterr()
    missing = {"data": {"folder": str(tmp_path / "dogs")}}
    assert alone.main(["--preset", "photos", "--overrides", json.dumps(missing)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "dogs" in error


def test_a_copied_release_is_the_same_release(latest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nightly_eval(str(latest))
    copy = tmp_path / "copy"
    shutil.copytree(latest.resolve(), copy)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        nightly_eval(str(copy))
    assert "done in" not in caplog.text
