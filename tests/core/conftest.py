"""A tiny network and everything else that a release is made of, made once for all tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from release_parts import FINISH, TINY, make_checkpoint, make_choice, make_inference, make_precision, make_report
from safetensors.torch import save_file

from tinycats_core.compute import costs
from tinycats_core.config import CLASSES, ClassifierConfig, ExportConfig, ReleaseConfig
from tinycats_core.data import preparation, splits
from tinycats_core.evaluation.classifier import train_classifier
from tinycats_core.files import sha256_of, write_json
from tinycats_core.generator import sampling
from tinycats_core.generator.weights import load_generator
from tinycats_core.presets import load
from tinycats_core.records import Dataset, Decision, OnnxModel, ParentRelease, Term, Weights
from tinycats_core.release import export, graph_check


@pytest.fixture(scope="session")
def config() -> ReleaseConfig:
    return load(TINY)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("training")
    (folder / "log.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    stop = {"event": "stop", "step": 3, "cause": f"{folder}/checkpoints cannot be written", "steps": 3, "seconds": 1.0}
    (folder / "diary.jsonl").write_text(json.dumps(stop) + "\n" + json.dumps(FINISH) + "\n")
    config = load(TINY | {"compute": {"where": "modal", "gpu": "L4"}})
    costs.record(folder, config.model, config.train, config.compute, costs.estimate(config.model, config.train, config.compute))
    return make_checkpoint(folder / "ema.safetensors")


@pytest.fixture(scope="session")
def fp32(checkpoint: Weights, config: ReleaseConfig, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export.export_denoiser(checkpoint, config.export, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def int8(fp32: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export.quantize(fp32, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def dataset(config: ReleaseConfig, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return preparation.prepare(config.data, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def classifier(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A small network that has seen each drawing once."""
    return train_classifier(dataset, ClassifierConfig(backbone="resnet8", epochs=1), tmp_path_factory.mktemp("classifier"), "cpu")


@pytest.fixture(scope="session")
def classifier_onnx(classifier: Weights, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export.export_classifier(classifier, dataset, ExportConfig(), tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def parts(
    config: ReleaseConfig,
    checkpoint: Weights,
    fp32: OnnxModel,
    int8: OnnxModel,
    dataset: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The arguments of `bundle.build`, but for the registry."""
    folder = tmp_path_factory.mktemp("parts")
    network, _ = load_generator(checkpoint.path)
    labels = sampling.labels_like(splits.load_split(dataset, "test")[1], 52, len(CLASSES))
    settings = {"model": checkpoint.sha256, "runtime": "pytorch"}
    choice = make_choice(folder / "sweep-0123.json", checkpoint, config.sample.single())
    decision = folder / "decision.json"
    terms = (Term(name="kid_not_worse", value=0.0345, bar=0.0456, passed=True, why="lower than before"),)
    write_json(decision, {"promoted": True})

    def measured(model: Weights | OnnxModel) -> dict[str, Any]:
        return {"drawn_by": {"model": model.sha256}, "dataset": dataset.content, "classifier_sha256": None}

    return {
        "config": config,
        "dataset": dataset,
        "choice": choice,
        "samples": sampling.generate(network, labels, 16, 13, choice.sample, folder / "samples.safetensors", settings),
        "report": make_report(
            folder / "report.json", "pytorch", 0.0345, **measured(checkpoint), weights=f"read from {folder}/weights.pth"
        ),
        "decision": Decision(path=decision, sha256=sha256_of(decision), promoted=True, terms=terms, baseline="0123456789ab"),
        "models": [export.check(checkpoint, model, config.export, folder) for model in (fp32, int8)],
        "graphs": [graph_check.export_graph(model, choice.sample, config.export, folder) for model in (fp32, int8)],
        "classifier": None,
        "classifier_onnx": None,
        "baseline": make_report(folder / "baseline.json", "pytorch", 0.0399),
        "onnx_reports": [make_report(folder / "int8.json", "onnx-int8", 0.0351, **measured(int8))],
        "parent": ParentRelease(version="0123456789ab", sha256="0" * 64),
        "precision": make_precision(folder / "precision.json"),
        "inference": make_inference(folder / "inference.json"),
        "ema_and_raw": sampling.draw_ema_and_raw(
            checkpoint, make_checkpoint(folder / "raw.safetensors", seed=1), choice.sample, folder / "ema_and_raw.png"
        ),
    }


@pytest.fixture
def two_colours(tmp_path: Path) -> Dataset:
    """Twenty pictures of two classes: dark ones and bright ones."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    noise = torch.randint(0, 30, (20, 3, 8, 8), generator=generator)
    images = (noise + 200 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    path = tmp_path / "data" / "images.safetensors"
    path.parent.mkdir()
    save_file(
        {
            "train_images": images,
            "train_labels": labels,
            "val_images": images[:0].clone(),
            "val_labels": labels[:0].clone(),
            "test_images": images[:4].clone(),
            "test_labels": labels[:4].clone(),
        },
        path,
    )
    return Dataset(
        path=path,
        sha256=sha256_of(path),
        source="folder",
        image_size=8,
        classes=("dark", "bright"),
        train_count=20,
        val_count=0,
        test_count=4,
    )
