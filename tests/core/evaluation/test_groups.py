"""Cats are judged as cats: the figures of each group, the share of `other`, and the choice by cats alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sets import draw_cats, make_dataset, make_samples
from torch import Tensor

from tinycats_core.config import ClassifierConfig, EvaluateConfig, SampleOptions
from tinycats_core.data.splits import load_split
from tinycats_core.errors import ConfigError, EvaluationError
from tinycats_core.evaluation import fidelity, gate, sweep, trials
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.evaluation.samples import labels_to_draw
from tinycats_core.files import read_json
from tinycats_core.records import Dataset, FidelityReport, Trained, Weights

CLASSES = ("Bombay", "Persian", "other")
CONFIG = EvaluateConfig(extractor="breed", kid_subsets=20, samples=60)
PER_COPY = ("copy_rate", "altered_copy_rate", "authenticity")  # compared with all training images, whatever the group


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A third of each split is `other`."""
    train, val, test = (draw_cats(CLASSES, count, 16, seed) for seed, count in enumerate((24, 12, 20)))
    return make_dataset(tmp_path_factory.mktemp("cats"), train, test, CLASSES, val)


@pytest.fixture(scope="module")
def classifier(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    config = ClassifierConfig(backbone="resnet8", epochs=1, batch_size=16)
    return train_classifier(cats, config, tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    return draw_cats(CLASSES, 20, 16, seed=3)


@pytest.fixture(scope="module")
def report(drawn: tuple[Tensor, Tensor], cats: Dataset, classifier: Weights, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("evaluations")
    return fidelity.evaluate(make_samples(folder / "drawn.safetensors", *drawn), cats, CONFIG, classifier, folder, "cpu")


def only(split: tuple[Tensor, Tensor], labels: set[int]) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor([int(label) in labels for label in split[1]])
    return split[0][chosen], split[1][chosen]


def without(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None and not name.startswith(PER_COPY)}


@pytest.mark.parametrize(("name", "labels"), [("cats", {0, 1}), ("other", {2})])
def test_figures_of_a_group_are_those_of_data_that_hold_nothing_else(
    name: str,
    labels: set[int],
    report: FidelityReport,
    drawn: tuple[Tensor, Tensor],
    cats: Dataset,
    classifier: Weights,
    tmp_path: Path,
) -> None:
    splits = [only(load_split(cats, split), labels) for split in ("train", "test")]
    data = make_dataset(tmp_path / "data", splits[0], splits[1], CLASSES)
    samples = make_samples(tmp_path / "drawn.safetensors", *only(drawn, labels))
    alone = fidelity.evaluate(samples, data, CONFIG, classifier, tmp_path, "cpu")
    assert (alone.groups, alone.conditions.get("group")) == ((), None)
    of_group = report if name == "cats" else report.of_group(name)
    assert of_group is not None
    # Features differ in their last bits with the batch, so that a neighbour may be another one.
    near = partial(pytest.approx, rel=1e-3, abs=0.02)
    assert without(of_group.metrics) == near(without(alone.metrics))
    assert without(of_group.floor) == near(without(alone.floor))
    assert of_group.conditions["trivial_kid"] == near(alone.conditions["trivial_kid"])
    for key in ("generated", "reference", "floor", "kid_subset_size"):
        assert of_group.conditions[key] == alone.conditions[key], key
    everything = report.of_group("all")
    assert everything is not None
    assert without(of_group.metrics) != near(without(everything.metrics))


def test_figures_of_all_are_those_of_one_group(
    report: FidelityReport,
    drawn: tuple[Tensor, Tensor],
    cats: Dataset,
    classifier: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fidelity, "is_divided", lambda *_: False)
    samples = make_samples(tmp_path / "drawn.safetensors", *drawn)
    one = fidelity.evaluate(samples, cats, CONFIG, classifier, tmp_path, "cpu")
    written = read_json(one.path)
    assert "groups" not in written
    assert not {"group", "groups"} & written["conditions"].keys()
    assert written == one.model_dump(mode="json", exclude={"path", "sha256"})
    found = report.of_group("all")
    assert found is not None
    assert (found.metrics, found.floor) == (one.metrics, one.floor)
    assert report.classes == one.classes  # of every class, `other` too
    decision = gate.decide(report, one, "0123456789ab", CONFIG, tmp_path)
    (comparable,) = [term for term in decision.terms if term.name == "comparable"]
    assert not comparable.passed
    assert "(floor, generated, group, groups, kid_subset_size, reference): measure it again" in comparable.why


def test_a_report_says_its_groups(report: FidelityReport) -> None:
    assert read_json(report.verify().path) == report.model_dump(mode="json", exclude={"path", "sha256"})
    assert report.conditions["group"] == "cats"
    assert report.conditions["groups"] == {"other": 20, "all": 60}
    assert [report.conditions[name] for name in ("generated", "reference", "floor")] == [40, 40, 40]
    assert all(group.metrics.keys() == group.floor.keys() == report.metrics.keys() for group in report.groups)
    assert report.of_group("dogs") is None


def evaluate(labels: Tensor, cats: Dataset, classifier: Weights, folder: Path) -> FidelityReport:
    images = torch.randint(0, 256, (len(labels), 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = make_samples(folder / "drawn.safetensors", images, labels)
    return fidelity.evaluate(samples, cats, CONFIG, classifier, folder, "cpu")


def test_the_share_of_other_is_a_setting(cats: Dataset, classifier: Weights, tmp_path: Path) -> None:
    assert torch.bincount(labels_to_draw(cats, 60)).tolist() == [20, 20, 20]
    half, none = labels_to_draw(cats, 60, 0.5), labels_to_draw(cats, 60, 0.0)
    assert (torch.bincount(half).tolist(), torch.bincount(none).tolist()) == ([15, 15, 30], [30, 30])
    assert half.tolist() == sorted(half.tolist())
    found = evaluate(half, cats, classifier, tmp_path)
    assert found.conditions["groups"] == {"other": 30}  # of all in another proportion nothing is said
    assert (found.conditions["generated"], found.conditions["reference"]) == (30, 40)
    alone = evaluate(none, cats, classifier, tmp_path)
    assert (alone.conditions["group"], alone.conditions["groups"], alone.groups) == ("cats", {}, ())
    assert not [term for term in gate.decide(alone, None, None, CONFIG, tmp_path).terms if term.name.startswith("other")]


def test_a_group_too_small_to_be_judged_is_refused_or_part_of_all(cats: Dataset, classifier: Weights, tmp_path: Path) -> None:
    few = labels_to_draw(cats, 60, 0.1)
    with pytest.raises(EvaluationError, match=r"6 generated images of other; at least 16 .* Change evaluate\.other_share"):
        evaluate(few, cats, classifier, tmp_path)
    in_proportion = labels_to_draw(cats, 30)
    assert fidelity.judged_groups(in_proportion, cats, CONFIG) == ("all",)
    train, test = load_split(cats, "train"), load_split(cats, "test")
    little = make_dataset(tmp_path / "little", train, (test[0][:50], test[1][:50]), CLASSES)  # 10 of `other`
    assert fidelity.judged_groups(labels_to_draw(little, 60), little, CONFIG) == ("all",)
    with pytest.raises(EvaluationError, match=r"other_share is 0.5, but cats and other can only .* with 16 training and test"):
        fidelity.require_divided(labels_to_draw(little, 60, 0.5), little, CONFIG.model_copy(update={"other_share": 0.5}))


def test_a_share_of_a_class_that_is_not_there_is_refused(cats: Dataset) -> None:
    no_dogs = cats.model_copy(update={"classes": ("Bombay", "Persian", "Sphynx")})
    with pytest.raises(ConfigError, match=r"evaluate.other_share is 0.3, but the data has no class 'other' \(its classes: Bombay"):
        labels_to_draw(no_dogs, 60, 0.3)


def test_the_choice_is_made_by_cats_alone(cats: Dataset, classifier: Weights, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[list[int]] = []

    def sample(network: object, labels: Tensor, *_: object) -> Tensor:
        asked.append(torch.bincount(labels).tolist())
        return draw_cats(CLASSES, 12, 16, seed=5 + len(asked))[0][: len(labels)]

    monkeypatch.setattr(trials, "sample", sample)
    monkeypatch.setattr(trials, "load_generator", lambda *_: (None, None))
    weights = Weights(path=classifier.path, sha256=classifier.sha256, kind="generator", step=9, facts={"ema_decay": 0.9})
    options = SampleOptions(guidance=(1.0, 2.0), sweep_images=24)

    def choose(data: Dataset) -> Any:
        asked.clear()
        trained = Trained(averages=(weights,), raw=weights)
        return sweep.choose(trained, data, options, CONFIG, classifier, tmp_path / data.sha256[:6], "cpu")

    choice = choose(cats)
    assert asked == [[12, 12]] * 2
    assert choice.rule.startswith("the lowest kid_breed on the validation images of cats, the first of equals")
    conditions = read_json(choice.path)["conditions"]
    assert (conditions["group"], conditions["group_images"]) == ("cats", 24)
    images, labels = load_split(cats, "val")
    train, test = load_split(cats, "train"), load_split(cats, "test")
    other = make_dataset(tmp_path / "o", train, test, CLASSES, (torch.where((labels == 2).view(-1, 1, 1, 1), 0, images), labels))
    assert choose(other).rows == choice.rows  # the validation images of `other` have no say
