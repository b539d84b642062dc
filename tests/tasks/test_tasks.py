"""Each task is a function like any other: called from plain Python, without a flow, with or without Prefect's engine."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.data import prepare_data, validate_data
from tasks.preflight import check_judgeable, check_ready
from tasks.sampling import generate_samples
from tasks.sweep import choose_sampling, train_and_watch
from tasks.training import train_generator
from tinycats_core.compute import remote
from tinycats_core.compute.clock import Clock
from tinycats_core.config import ComputeConfig, DataConfig, EvaluateConfig, ModelConfig, SampleConfig, SampleOptions, TrainConfig
from tinycats_core.errors import ConfigError, DataError, EvaluationError
from tinycats_core.files import read_json, write_json
from tinycats_core.presets import resolve
from tinycats_core.records import Course, Dataset, SweepRow, Trained, Weights
from tinycats_core.training import start

DATA = DataConfig(source="toycats", image_size=16, toy_train_per_class=3, toy_val_per_class=1, toy_test_per_class=2)
MODEL = ModelConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2)
TRAIN = TrainConfig(steps=2, batch_size=4, warmup_steps=1, snapshots=1)


@pytest.fixture
def dataset() -> Dataset:
    return prepare_data.fn(DATA)


def test_a_task_called_outside_a_flow_runs_and_is_cached(prefect_server: str) -> None:
    first = prepare_data(DATA)
    assert first.train_count == 3 * 13
    assert prepare_data(DATA) == first
    assert len(validate_data(first, DATA).rows) == 13


def test_the_functions_need_no_prefect(dataset: Dataset) -> None:
    validate_data.fn(dataset, DATA)
    checkpoint = train_generator.fn(dataset, MODEL, TRAIN, ComputeConfig())
    samples = generate_samples.fn(checkpoint.ema, dataset, SampleConfig(steps=1), 26, ComputeConfig())
    assert samples.verify().count == 26
    assert samples.settings["model"] == checkpoint.ema.sha256


def test_a_choice_is_made_without_prefect(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = train_generator.fn(dataset, MODEL, TRAIN, ComputeConfig())
    arguments = dataset, SampleOptions(steps=1, guidance=(1.5,)), EvaluateConfig(extractor="breed"), None, ComputeConfig()
    with caplog.at_level(logging.INFO):
        choice = choose_sampling.fn(checkpoint, Course(), *arguments)
    assert (choice.weights.sha256, choice.sample.guidance) == (checkpoint.ema.sha256, 1.5)
    assert "EMA 0.9999, guidance 1.5 in [0.0, 1.0]: there was one average and one setting" in caplog.text


def test_a_training_by_the_clock_keeps_the_averages_of_each_snapshot(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(average: Weights, *_: Any) -> SweepRow:
        setting = {"ema_decay": 0.9, "guidance": 1.5, "guidance_interval": (0.0, 1.0)}
        return SweepRow.model_validate(
            setting | {"step": average.step, "kid_breed": 0.1, "copy_rate": 0.0, "altered_copy_rate": 0.0}
        )

    monkeypatch.setattr("tasks.sweep.judge_snapshot", judge)
    monkeypatch.setattr("tasks.sweep.train_generator", train_generator.fn)
    train = {"steps": 9, "snapshots": 2, "batch_size": 4, "warmup_steps": 1, "ema_decays": [0.9, 0.5]}
    config = resolve(
        "smoke", {"model": MODEL.model_dump(), "data": DATA.model_dump(mode="json"), "train": train | {"snapshots": 2}}
    )
    decided = {"stops": [2, 4], "pace": {"step": 1, "judging": 1, "closing": 1}}  # by a command that was stopped
    path = write_json(tmp_path / "clock.json", decided)
    clock = Clock(path, 5, time.monotonic())
    trained, course = train_and_watch(dataset, config, None, clock)
    found = [(average.step, average.facts["ema_decay"]) for average in trained.verify().averages]
    assert found == [(4, 0.9), (4, 0.5), (2, 0.9), (2, 0.5)]
    assert trained.raw.step == 4
    assert [row.step for row in course.rows] == [2, 4]
    assert str(course.ended).startswith("at step 4 of at most 9: the rest of the 5 minutes")
    assert read_json(path)["stops"] == [2, 4]


def test_what_training_took_is_recorded_and_said(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end = {"event": "finish", "step": 3, "time": "2026-01-02T03:04:05+00:00", "seconds": 72.0, "images": 12}
    end |= {"images_per_s": 0.167, "attempts": 2, "seconds_lost": 1.5, "device": "cpu", "processes": 1, "precision": "fp32"}
    train = start.train

    def keep_a_diary(dataset: Dataset, model: ModelConfig, config: TrainConfig, folder: Path, *rest: Any) -> Trained:
        checkpoint = train(dataset, model, config, folder, *rest)
        (folder / "diary.jsonl").write_text(json.dumps(end) + "\n")
        return checkpoint

    monkeypatch.setattr(start, "train", keep_a_diary)
    with caplog.at_level(logging.INFO):
        checkpoint = train_generator.fn(dataset, MODEL, TRAIN.model_copy(update={"steps": 3}), ComputeConfig(device="cpu"))
    assert "training took 0.02 h at 0.167 images/s on cpu, 2 attempts: no dollars" in caplog.text
    cost = json.loads(checkpoint.ema.path.with_name("cost.json").read_text())
    assert (cost["hours"], cost["dollars"], cost["estimate"]["steps"]) == (0.02, None, 3)


def test_what_training_will_cost_is_said_before_it(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve("smoke", tiny)
    on_modal = config.compute.model_copy(update={"where": "modal", "gpu": "L4"})
    monkeypatch.setattr(remote, "check_compute", lambda compute, app_files: "nowhere")
    with caplog.at_level(logging.INFO):
        check_ready(config.model_copy(update={"compute": on_modal}))
    assert "to train: 400 steps × 32 images on L4: " in caplog.text
    assert "$0.7992/h a GPU (second-hand list, not verified" in caplog.text


def test_the_judge_is_there_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("smoke", {"evaluate": {"extractor": "inception"}, "publish": {"folder": str(tmp_path / "releases")}})
    monkeypatch.delenv("TINYCATS_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(EvaluationError, match=r"cannot be downloaded .* evaluate\.extractor to 'breed'"):
        check_ready(config)
    (tmp_path / "page.html").write_text("<html>not found</html>")
    monkeypatch.setenv("TINYCATS_INCEPTION_WEIGHTS", str(tmp_path / "page.html"))
    with pytest.raises(EvaluationError, match=r"page\.html .* does not hold torch-fidelity's InceptionV3 weights"):
        check_ready(config)


def test_images_that_are_too_few_to_judge_by_are_known_before_anything_is_trained(dataset: Dataset) -> None:
    few = dataset.model_copy(update={"test_count": 15})
    with pytest.raises(EvaluationError, match=r"15 test images; at least 16 .* data\.test_fraction"):
        check_judgeable(few, resolve("smoke"))
    check_judgeable(dataset.model_copy(update={"test_count": 16}), resolve("smoke"))
    with pytest.raises(EvaluationError, match="cats and other can only be judged apart with 16 training and test images of each"):
        check_judgeable(dataset, resolve("smoke", {"evaluate": {"other_share": 0.5}}))
    no_others = dataset.model_copy(update={"classes": dataset.classes[:-1]})
    with pytest.raises(ConfigError, match="train.other_share is 0.5, but the data has no class 'other'"):
        check_judgeable(no_others, resolve("smoke", {"train": {"other_share": 0.5}}))


def test_a_model_of_other_images_is_refused(dataset: Dataset) -> None:
    checkpoint = train_generator.fn(dataset, MODEL, TRAIN, ComputeConfig())
    larger = prepare_data.fn(DATA.model_copy(update={"image_size": 32}))
    with pytest.raises(EvaluationError, match="draws 13 classes at 16 px, but the data set has 13 at 32 px"):
        generate_samples.fn(checkpoint.ema, larger, SampleConfig(steps=1), 26, ComputeConfig())


def test_a_text_file_named_jpg_stops_the_data_check(tmp_path: Path) -> None:
    for breed in ("Bengal", "Bombay"):
        (tmp_path / breed).mkdir()
        (tmp_path / breed / "1.jpg").write_text("not an image")
    config = DataConfig(source="folder", folder=tmp_path, image_size=16)
    with pytest.raises(DataError, match=r"1\.jpg"):
        validate_data.fn(prepare_data.fn(config), config)
