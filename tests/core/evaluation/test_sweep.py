"""The sweep picks what is measured to be best on the validation images, and looks at no other images to do so."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sets import draw_cats, make_dataset

from tinycats_core.config import ClassifierConfig, EvaluateConfig, ModelConfig, SampleConfig, SampleOptions, TrainConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import EvaluationError, TinycatsError
from tinycats_core.evaluation import sweep
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.evaluation.gate import copy_bar
from tinycats_core.evaluation.memorization import COPY_RATES
from tinycats_core.evaluation.trials import Trials
from tinycats_core.files import read_json
from tinycats_core.generator.weights import load_generator, save_generator
from tinycats_core.records import Choice, Course, Dataset, SweepRow, Trained, Weights
from tinycats_core.training.start import train

CLASSES = ("Bombay", "Persian", "other")
CONFIG = EvaluateConfig(extractor="breed", kid_subsets=20)
MODEL = ModelConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, num_classes=3)
TRAIN = TrainConfig(steps=150, batch_size=16, lr=4e-3, warmup_steps=10, ema_decays=(0.9,), log_every=50)
ONE = SampleOptions(steps=3, guidance=(1.0,), sweep_images=24)
THREE = SampleOptions(steps=3, guidance=(1.0, 1.5), guidance_interval=((0.0, 1.0), (0.2, 0.8)), sweep_images=24)


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train, val, test = (draw_cats(CLASSES, count, 16, seed) for seed, count in enumerate((20, 8, 2)))
    return make_dataset(tmp_path_factory.mktemp("cats"), train, test, CLASSES, val)


@pytest.fixture(scope="module")
def classifier(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    config = ClassifierConfig(backbone="resnet8", epochs=2, batch_size=16)
    return train_classifier(cats, config, tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="module")
def good(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return train(cats, MODEL, TRAIN, tmp_path_factory.mktemp("training"), "cpu").ema


@pytest.fixture(scope="module")
def spoilt(good: Weights, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The same weights with noise added to them."""
    network, header = load_generator(good.path)
    generator = torch.Generator().manual_seed(0)
    weights = {name: w + 0.2 * torch.randn(w.shape, generator=generator) for name, w in network.state_dict().items()}
    path = tmp_path_factory.mktemp("spoilt") / "ema-0.1.safetensors"
    return save_generator(path, weights, header.model, header.classes, header.step, {"ema_decay": 0.1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


def trained(*averages: Weights, raw: Weights | None = None) -> Trained:
    return Trained(averages=averages, raw=raw or averages[-1])


def test_the_better_average_is_chosen_wherever_it_stands(
    good: Weights, spoilt: Weights, cats: Dataset, classifier: Weights, folder: Path
) -> None:
    for both in (trained(spoilt, good), trained(good, spoilt)):
        choice = sweep.choose(both, cats, ONE, CONFIG, classifier, folder, "cpu")
        assert choice.weights == good
        assert {row.ema_decay: row.chosen for row in choice.rows} == {0.9: True, 0.1: False}


def test_what_passes_the_bars_of_the_sweep_passes_those_of_the_gate(cats: Dataset, classifier: Weights, folder: Path) -> None:
    trials = Trials.load(cats, ONE, CONFIG, classifier, folder, "cpu")
    assert {*trials.bars} == {*COPY_RATES}
    for name, rate in trials.bars.items():
        at_gate = copy_bar(getattr(trials.left_out, name), CONFIG.samples, trials.left_out.images + cats.test_count)
        assert 0 < rate + 1.96 * math.sqrt(rate * (1 - rate) / ONE.sweep_images) == pytest.approx(at_gate)


@pytest.fixture(scope="module")
def choice(good: Weights, cats: Dataset, classifier: Weights, folder: Path) -> Choice:
    return sweep.choose(trained(good), cats, THREE, CONFIG, classifier, folder, "cpu")


def test_the_choice_is_a_file_with_every_row(choice: Choice, folder: Path) -> None:
    written = read_json(choice.verify().path)
    assert written["rows"] == [row.model_dump(mode="json") for row in choice.rows]
    keys = ["chosen", "step", "copies", "ema_decay", "guidance", "guidance_interval", "fd_breed"]
    assert list(written["rows"][0])[: len(keys)] == keys
    assert list(written["rows"][0])[-1] == "altered_copy_rate"
    assert written["sample"] == choice.sample.model_dump(mode="json")
    assert (written["split"], written["images"], written["validation_images"], written["ema_decay"]) == ("val", 24, 24, 0.9)
    assert [(row.guidance, row.guidance_interval) for row in choice.rows] == [(1, (0, 1)), (1.5, (0, 1)), (1.5, (0.2, 0.8))]
    measured = {"kid_breed", "kid_breed_std", "fd_breed", "precision", "recall", "copy_rate", "altered_copy_rate", "mind_breed"}
    assert all(measured <= row.metrics.keys() for row in choice.rows)
    best = min(choice.rows, key=lambda row: row.metrics["kid_breed"])
    assert [row for row in choice.rows if row.chosen] == [best]
    assert (choice.sample.guidance, choice.sample.guidance_interval) == (best.guidance, best.guidance_interval)
    assert choice.sample in THREE.candidates()  # with the seed of the final figures, not that of the sweep
    assert [row.step for row in choice.rows] == [150] * 3
    assert len(list((folder / "cache").iterdir())) == 3  # two of the validation images, copy rates of training: no floor, no noise


def test_the_test_split_has_no_say(choice: Choice, good: Weights, cats: Dataset, classifier: Weights, tmp_path: Path) -> None:
    images, labels = load_split(cats, "test")
    test = (255 - images[:3], labels[:3])
    other = make_dataset(tmp_path / "data", load_split(cats, "train"), test, CLASSES, load_split(cats, "val"))
    assert sweep.choose(trained(good), other, THREE, CONFIG, classifier, tmp_path, "cpu").rows == choice.rows


def test_one_pair_is_taken_and_nothing_is_drawn(
    good: Weights, cats: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "load", lambda *_: pytest.fail("drawn"))
    choice = sweep.choose(trained(good), cats, ONE, CONFIG, None, tmp_path, "cpu")
    assert (choice.weights, choice.sample, choice.rows, choice.note) == (good, ONE.single(), (), None)
    assert "nothing was drawn" in choice.rule


def test_too_few_validation_images_give_their_place_to_the_training_images_and_say_so(
    good: Weights, spoilt: Weights, cats: Dataset, classifier: Weights, tmp_path: Path
) -> None:
    images, labels = load_split(cats, "val")
    train, test = load_split(cats, "train"), load_split(cats, "test")
    few = make_dataset(tmp_path / "few", train, test, CLASSES, (images[:15], labels[:15]))
    choice = sweep.choose(trained(spoilt, good), few, ONE, CONFIG, classifier, tmp_path, "cpu")
    assert choice.weights == good
    assert "there are 15 validation images; at least 16 are needed, so the training images took their place" in str(choice.note)
    assert read_json(choice.path)["split"] == "train"


def row(step: int, kid: float, copy_rate: float = 0.0, altered: float = 0.0, guidance: float = 1.0, decay: float = 0.9) -> SweepRow:
    figures: dict[str, Any] = {"kid_breed": kid, "copy_rate": copy_rate, "altered_copy_rate": altered}
    copies = copy_rate > 0.2 or altered > 0.3
    return SweepRow(step=step, copies=copies, ema_decay=decay, guidance=guidance, guidance_interval=(0, 1), **figures)


def at(good: Weights, step: int, decay: float = 0.9) -> Weights:
    """The same weights, as if they were of another step."""
    return good.model_copy(update={"step": step, "facts": {"ema_decay": decay}})


def choose_of(
    rows: list[SweepRow], good: Weights, cats: Dataset, classifier: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Choice, list[tuple[int, float]]]:
    """Choose where the trials measure `rows`. Returns the trials too."""
    tried = []

    def measure(self: Trials, average: Weights, setting: SampleConfig) -> SweepRow:
        tried.append((average.step, setting.guidance))
        return next(row for row in rows if row.step == average.step and row.guidance == setting.guidance)

    monkeypatch.setattr(Trials, "measure", measure)
    options = SampleOptions(steps=3, guidance=(1.0, 2.0), sweep_images=24)
    averages = [at(good, step) for step in sorted({row.step for row in rows if row.step}, reverse=True)]
    return sweep.choose(trained(*averages), cats, options, CONFIG, classifier, folder, "cpu"), tried


def test_the_step_is_that_of_the_lowest_kid_that_is_no_copier(
    good: Weights, cats: Dataset, classifier: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(100, 0.4), row(200, 0.2), row(300, 0.1, 0.5), row(400, 0.05, altered=0.9), row(200, 0.15, guidance=2.0)]
    choice, tried = choose_of(rows, good, cats, classifier, folder, monkeypatch)
    assert tried == [(100, 1.0), (200, 1.0), (300, 1.0), (400, 1.0), (200, 2.0)]
    assert (choice.weights.step, choice.sample.guidance) == (200, 2.0)
    assert [row.step for row in choice.rows if row.copies] == [300, 400]
    assert read_json(choice.path)["step"] == 200


def test_if_all_are_copiers_the_least_of_them_is_taken_and_named_so(
    good: Weights, cats: Dataset, classifier: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(100, 0.4, 0.4), row(200, 0.2, 0.3), row(250, 0.1, 0.2, 0.5), row(300, 0.1, 0.5), row(200, 0.1, 0.9, guidance=2.0)]
    choice, _ = choose_of(rows, good, cats, classifier, folder, monkeypatch)
    assert (choice.weights.step, choice.sample.guidance) == (200, 1.0)
    assert choice.rule.startswith("the lowest copy rates")


def test_what_was_measured_during_the_training_is_not_measured_again(
    good: Weights, cats: Dataset, classifier: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sweep.judge_snapshot(good, cats, THREE, CONFIG, classifier, folder, "cpu")
    course = Course(rows=(seen,), ended="at step 150 of 300: it was enough")
    choice = sweep.choose(trained(good), cats, THREE, CONFIG, classifier, folder, "cpu", course=course)
    alone = sweep.choose(trained(good), cats, THREE, CONFIG, classifier, folder, "cpu")
    assert (choice.rows, choice.weights, choice.sample) == (alone.rows, alone.weights, alone.sample)
    assert read_json(choice.path)["ended"] == course.ended
    monkeypatch.setattr(Trials, "measure", lambda *_: pytest.fail("measured again"))
    both = Course(rows=(seen, row(75, 9.0)))
    assert sweep.choose(trained(good, at(good, 75)), cats, ONE, CONFIG, classifier, folder, "cpu", course=both).weights == good


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], None),
        ([row(1, 0.4), row(2, 0.3), row(3, 0.2)], None),
        ([row(1, 0.4), row(2, 0.2), row(3, 0.3), row(4, 0.3)], None),  # no better, but it does not copy
        ([row(1, 0.4), row(2, 0.2), row(3, 0.1, 0.5)], None),  # patience
        ([row(1, 0.4), row(2, 0.2), row(3, 0.1, 0.5), row(4, 0.05, 0.6)], "step 4 are copies .* last 2 snapshots"),
        ([row(1, 0.4), row(2, 0.2), row(3, 0.3), row(4, 0.05, 0.6)], "step 4 are copies .* last 2 snapshots"),
        ([row(1, 0.4, 0.5), row(2, 0.2, 0.6)], "copy_rate 0.6, altered_copy_rate 0"),
    ],
)
def test_a_training_ends_once_it_copies_and_becomes_no_better(rows: list[SweepRow], why: str | None) -> None:
    reason = sweep.why_stop(rows, "kid_breed", patience=2)
    assert reason is None if why is None else re.search(why, str(reason))


def test_a_choice_stands_for_its_weights_too(good: Weights, cats: Dataset, tmp_path: Path) -> None:
    moved = good.in_folder(tmp_path)
    moved.path.write_bytes(good.path.read_bytes())
    choice = sweep.choose(trained(moved), cats, ONE, CONFIG, None, tmp_path, "cpu")
    assert choice.is_intact()
    assert choice.content == sweep.choose(trained(good), cats, ONE, CONFIG, None, tmp_path, "cpu").content
    moved.path.unlink()
    assert not choice.is_intact()
    with pytest.raises(TinycatsError, match="is gone"):
        choice.verify()


def test_errors_are_those_of_the_judge(good: Weights, cats: Dataset, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no classifier"):
        sweep.choose(trained(good), cats, THREE, CONFIG, None, tmp_path, "cpu")
    assert not list(tmp_path.glob("sweep-*.json"))


def test_progress_is_told_pair_by_pair(good: Weights, cats: Dataset, classifier: Weights, folder: Path) -> None:
    told: list[Any] = []
    sweep.choose(trained(good), cats, THREE, CONFIG, classifier, folder, "cpu", on_row=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_raw_weights_are_never_a_choice(
    good: Weights, spoilt: Weights, cats: Dataset, classifier: Weights, folder: Path
) -> None:
    choice = sweep.choose(trained(spoilt, raw=good), cats, ONE, CONFIG, classifier, folder, "cpu")
    assert choice.weights == spoilt
    assert choice.rows == ()


def test_averages_that_the_training_was_too_short_for_are_tried_once(tmp_path: Path) -> None:
    def average(decay: float, step: int) -> Weights:
        return Weights(path=tmp_path / "ema", sha256=str(decay), kind="generator", step=step, facts={"ema_decay": decay})

    def kept(step: int) -> list[float | int | str | None]:
        return [one.facts["ema_decay"] for one in sweep.distinct([average(decay, step) for decay in (0.9999, 0.999, 0.99)])]

    assert kept(100) == [0.9999]
    assert kept(4_000) == [0.9999, 0.99]
    assert kept(200_000) == [0.9999, 0.999, 0.99]
    assert [one.step for one in sweep.distinct([average(0.99, step) for step in (200, 100)])] == [200, 100]
