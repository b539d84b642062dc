import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from small_sets import draw_cats, make_dataset
from torch import Tensor

from tinycats_core.config import ClassifierConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import CheckpointError, ComputeError, DataError, TinycatsError, TrainingError
from tinycats_core.evaluation.classifier import BreedClassifier, augment, load_classifier, predict, report_on, train_classifier
from tinycats_core.files import read_json
from tinycats_core.records import Dataset, Weights
from tinycats_core.tensors import read_safetensors, write_safetensors

CLASSES = ("Bombay", "Persian", "Sphynx", "other")
CONFIG = ClassifierConfig(backbone="resnet8", epochs=4, batch_size=24, lr=1e-3)
SHORT = ClassifierConfig(backbone="mobilenet_v3_small", epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    train, test = draw_cats(CLASSES, 40, 40, seed=0), draw_cats(CLASSES, 20, 40, seed=1)
    return make_dataset(tmp_path_factory.mktemp("cats"), train, test, CLASSES, draw_cats(CLASSES, 5, 40, seed=2))


@pytest.fixture(scope="module")
def trained(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return train_classifier(cats, CONFIG, tmp_path_factory.mktemp("classifier"), "cpu")


def test_learns_and_reports_what_the_loaded_network_does(cats: Dataset, trained: Weights) -> None:
    images, labels = load_split(cats, "test")
    report = read_json(trained.path.with_name("report.json"))
    classifier = load_classifier(trained.path)

    assert report["accuracy"] >= 0.85
    assert report["accuracy"] == trained.facts["test_accuracy"]
    assert report["majority_accuracy"] == 0.25
    found = report_on(predict(classifier, images).argmax(1), labels, load_split(cats, "train")[1], CLASSES)
    assert {key: report[key] for key in found} == found
    assert [report["conditions"][f"{split}_images"] for split in ("train", "val", "test")] == [160, 20, 80]
    assert report["epochs"][-1]["val_accuracy"] <= trained.facts["val_accuracy"]
    best = max(report["epochs"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert best["epoch"] == trained.facts["epoch"]
    assert best["val_accuracy"] == trained.facts["val_accuracy"]


def test_finished_folder_is_returned_at_once(cats: Dataset, trained: Weights) -> None:
    rows: list[dict[str, Any]] = []
    before = trained.path.stat().st_mtime_ns
    again = train_classifier(cats, CONFIG, trained.path.parent, "cpu", rows.append)
    assert (again, rows, trained.path.stat().st_mtime_ns) == (trained, [], before)


def test_folder_of_another_configuration_is_refused(cats: Dataset, trained: Weights) -> None:
    with pytest.raises(CheckpointError, match="another configuration"):
        train_classifier(cats, SHORT, trained.path.parent, "cpu")


def test_same_seed_gives_the_same_file_and_the_test_split_has_no_say(cats: Dataset, tmp_path: Path) -> None:
    small = [tensor[::4] for tensor in load_split(cats, "train")]
    test = [tensor[::4] for tensor in load_split(cats, "test")]
    one = make_dataset(tmp_path / "a", (small[0], small[1]), (test[0], test[1]), CLASSES)
    other = make_dataset(tmp_path / "b", (small[0], small[1]), (255 - test[0], test[1].flip(0)), CLASSES)
    rows: list[dict[str, Any]] = []
    torch.manual_seed(1)
    first = train_classifier(one, SHORT, tmp_path / "1", "cpu", rows.append)
    torch.manual_seed(2)
    second = train_classifier(one, SHORT, tmp_path / "2", "cpu")
    third = train_classifier(other, SHORT, tmp_path / "3", "cpu")

    assert [row["epoch"] for row in rows] == [1]
    assert first.sha256 == second.sha256
    weights, others = read_safetensors(first.path, "classifier")[0], read_safetensors(third.path, "classifier")[0]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    reseeded = train_classifier(one, SHORT.model_copy(update={"seed": 1}), tmp_path / "4", "cpu")
    assert reseeded.sha256 != first.sha256


def test_damaged_result_is_not_returned(cats: Dataset, trained: Weights, tmp_path: Path) -> None:
    for name in ("classifier.safetensors", "report.json"):
        content = bytearray(trained.path.with_name(name).read_bytes())
        if name == "classifier.safetensors":
            content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TinycatsError, match="has changed"):
        train_classifier(cats, CONFIG, tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(tmp_path / "classifier.safetensors")


def test_only_the_recorded_network_is_built(trained: Weights, tmp_path: Path) -> None:
    tensors, header = read_safetensors(trained.path, "classifier")
    del header["digest"]
    path = tmp_path / "other.safetensors"

    def load(tensors: dict[str, Tensor] = tensors, **changes: Any) -> BreedClassifier:
        write_safetensors(path, tensors, {**header, **changes})
        return load_classifier(path)

    assert load(first_stride=1).backbone.get_submodule("conv1").stride == (1, 1)
    with pytest.raises(CheckpointError, match="another architecture"):
        load(backbone="resnet34")
    with pytest.raises(CheckpointError, match="another architecture"):
        load(classes=["cat", "dog"])
    with pytest.raises(CheckpointError, match="cannot read"):
        load(backbone="resnet9000")
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        load({name: tensor for name, tensor in tensors.items() if name != "head.bias"})
    with pytest.raises(CheckpointError, match="not a 'classifier' one"):
        load(kind="generator")
    path.write_bytes(trained.path.read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match="not a complete classifier"):
        load_classifier(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_classifier(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("backbone", get_args(ClassifierConfig.model_fields["backbone"].annotation))
def test_every_backbone_takes_images_as_they_are_stored(backbone: str) -> None:
    classifier = BreedClassifier(backbone, 33, CLASSES, first_stride=2).eval()
    images = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    with torch.inference_mode():
        logits, features = classifier(images), classifier.features(images)
        assert logits.shape == (2, 4)
        assert torch.equal(logits, classifier(images.float()))
        assert torch.equal(logits, classifier.head(features))
        assert not torch.equal(features[0], features[1])


def test_the_validation_images_choose_the_epoch(cats: Dataset, tmp_path: Path) -> None:
    train, val, test = ([tensor[::4] for tensor in load_split(cats, split)] for split in ("train", "val", "test"))
    settings = SHORT.model_copy(update={"epochs": 3})

    def trained_with(name: str, val: tuple[Tensor, Tensor] | None) -> tuple[Weights, list[dict[str, Any]]]:
        dataset = make_dataset(tmp_path / name, (train[0], train[1]), (test[0], test[1]), CLASSES, val)
        made = train_classifier(dataset, settings, tmp_path / f"{name}-classifier", "cpu")
        return made, read_json(made.path.with_name("report.json"))["epochs"]

    first, rows = trained_with("right", (val[0], val[1]))
    second, others = trained_with("wrong", (val[0], torch.zeros_like(val[1])))
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]  # nothing is trained on them
    assert [row["val_loss"] for row in rows] != [row["val_loss"] for row in others]
    for made, found in ((first, rows), (second, others)):
        assert made.facts["epoch"] == max(found, key=lambda row: (row["val_accuracy"], -row["val_loss"]))["epoch"]
        assert made.facts["epoch_chosen_by"] == "the validation images"


def test_without_validation_images_the_last_epoch_is_kept(cats: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = ([tensor[::4] for tensor in load_split(cats, split)] for split in ("train", "test"))
    dataset = make_dataset(tmp_path / "data", (train[0], train[1]), (test[0], test[1]), CLASSES)
    made = train_classifier(dataset, SHORT.model_copy(update={"epochs": 2}), tmp_path / "classifier", "cpu")
    assert (made.facts["epoch"], made.facts["val_accuracy"]) == (2, None)
    assert "last epoch" in str(made.facts["epoch_chosen_by"])
    assert "no validation images" in caplog.text


@pytest.fixture(scope="module")
def few(cats: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A fifth of the cats, without validation images."""
    train, test = ([tensor[::5] for tensor in load_split(cats, split)] for split in ("train", "test"))
    return make_dataset(tmp_path_factory.mktemp("few"), (train[0], train[1]), (test[0], test[1]), CLASSES)


@pytest.fixture(scope="module")
def plain(few: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return train_classifier(few, SHORT, tmp_path_factory.mktemp("plain"), "cpu")


@pytest.mark.parametrize(
    "change",
    [{"epochs": 2}, {"batch_size": 8}, {"lr": 3e-3}, {"weight_decay": 0.9}, {"backbone": "resnet8"}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_changes_what_is_learnt(few: Dataset, plain: Weights, change: dict[str, Any], tmp_path: Path) -> None:
    changed = train_classifier(few, SHORT.model_copy(update=change), tmp_path, "cpu")
    assert changed.sha256 != plain.sha256
    tensors, others = (read_safetensors(made.path, "classifier")[0] for made in (changed, plain))
    assert not torch.equal(tensors["head.weight"], others["head.weight"])
    assert changed.step == change.get("epochs", 1) * (4 if "batch_size" in change else 1)  # of 32 images


def test_the_learning_rate_rises_to_what_was_asked_for_and_falls_to_nothing(few: Dataset, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    train_classifier(few, SHORT.model_copy(update={"epochs": 10, "lr": 2e-3, "batch_size": 64}), tmp_path, "cpu", rows.append)
    rates = [row["lr"] for row in rows]
    highest = rates.index(max(rates))
    assert rates[:highest] == sorted(rates[:highest])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert 1 <= highest <= 3
    assert max(rates) == pytest.approx(2e-3, rel=0.05)
    assert rates[-1] < 1e-6


def test_the_rare_class_weighs_as_much_as_balance_says(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (80, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(80) % 10 == 0).long()  # one in ten, and nothing to tell it by
    dataset = make_dataset(tmp_path / "noise", (images[:60], labels[:60]), (images[60:], labels[60:]), ("common", "rare"))
    found = {}
    for balance in (0.0, 0.5, 1.0):
        settings = ClassifierConfig(backbone="resnet8", epochs=20, batch_size=20, balance=balance)
        made = train_classifier(dataset, settings, tmp_path / str(balance), "cpu")
        found[balance] = predict(load_classifier(made.path), images[60:]).softmax(1)[:, 1].mean().item()
    assert found[0.0] < 0.15
    assert found[0.0] < found[0.5] < found[1.0]
    assert found[1.0] == pytest.approx(0.5, abs=0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(few: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ComputeError, match=r"compute\.device is 'cuda'"):
        train_classifier(few, SHORT, tmp_path, "cuda")


def test_no_batch_has_a_single_image(tmp_path: Path) -> None:
    images, labels = draw_cats(CLASSES[:2], 2, 32, seed=0)  # at 32 px the last layer sees one pixel: batch norm needs two images
    for count in (3, 4):
        dataset = make_dataset(tmp_path / f"{count}", (images[:count], labels[:count]), (255 - images, 1 - labels), CLASSES[:2])
        settings = ClassifierConfig(epochs=1, batch_size=3)
        assert train_classifier(dataset, settings, tmp_path / f"{count}-classifier", "cpu").step == count - 2
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        ClassifierConfig(batch_size=2)


def test_what_has_no_test_images_has_no_figures(few: Dataset, tmp_path: Path) -> None:
    train, (images, labels) = load_split(few, "train"), load_split(few, "test")
    lacking = make_dataset(tmp_path / "lacking", train, (images[labels != 1], labels[labels != 1]), CLASSES)
    report = read_json(train_classifier(lacking, SHORT, tmp_path / "1", "cpu").path.with_name("report.json"))
    assert (report["classes"][1]["recall"], report["classes"][1]["support"]) == (None, 0)
    assert report["macro_recall"] == pytest.approx(sum(row["recall"] for row in report["classes"] if row["support"]) / 3)
    untested = make_dataset(tmp_path / "untested", train, (images[:0], labels[:0]), CLASSES)
    made = train_classifier(untested, SHORT, tmp_path / "2", "cpu")
    assert made.facts["test_accuracy"] is None
    report = read_json(made.path.with_name("report.json"))
    assert {report[name] for name in ("accuracy", "majority_accuracy", "macro_recall", "macro_f1")} == {None}


def test_a_class_without_training_images_is_refused(cats: Dataset, tmp_path: Path) -> None:
    images, labels = load_split(cats, "train")
    lacking = make_dataset(tmp_path / "data", (images[labels != 1], labels[labels != 1]), load_split(cats, "test"), CLASSES)
    with pytest.raises(DataError, match="'Persian' has 0 training images"):
        train_classifier(lacking, SHORT, tmp_path / "classifier", "cpu")


def test_report_by_hand() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 0])
    report = report_on(predicted, labels, torch.tensor([1, 1, 0]), ("a", "b", "c", "d"))
    assert report["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert (report["accuracy"], report["majority_accuracy"]) == (3 / 6, 2 / 6)
    a, b, c, d = report["classes"]
    assert a == {"class": "a", "precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    assert (b["precision"], b["recall"], b["f1"]) == (1 / 2, 1 / 2, 1 / 2)
    assert (c["precision"], c["recall"], c["f1"]) == (None, 0, 0)
    assert (d["precision"], d["recall"], d["f1"], d["support"]) == (None, None, None, 0)
    assert report["macro_recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)  # of the classes that have images
    assert report["macro_f1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    json.dumps(report, allow_nan=False)


def test_augmentation_moves_pictures_and_brings_no_border() -> None:
    white = torch.full((8, 3, 24, 24), 255, dtype=torch.uint8)
    torch.testing.assert_close(augment(white, torch.Generator().manual_seed(0)), white.float())
    images = draw_cats(("Bengal",), 8, 24, seed=0)[0]
    moved = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert all((moved[i] - images[i]).abs().mean() > 5 for i in range(8))
    assert all((moved[i].mean() - images[i].float().mean()).abs() < 25 for i in range(8))


def test_weights_that_cannot_be_downloaded(cats: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(TrainingError, match=r"resnet18 cannot be downloaded.*classifier\.pretrained"):
        train_classifier(cats, ClassifierConfig(backbone="resnet18", pretrained=True), tmp_path / "classifier", "cpu")
    assert not (tmp_path / "classifier" / "report.json").exists()
