"""A tiny network and everything else that a release is made of, made once for all tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tinycats_core import data, export, sampling
from tinycats_core.checkpoint import load_generator, save_generator
from tinycats_core.config import CLASSES, ReleaseConfig, load
from tinycats_core.files import sha256_of, write_json
from tinycats_core.model import TinyDiT
from tinycats_core.records import Checkpoint, Dataset, Decision, FidelityReport, OnnxModel

TINY = {
    "data": {"source": "toycats", "image_size": 16, "toy_train_per_class": 2, "toy_test_per_class": 2},
    "model": {"image_size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2},
    "sample": {"sampler": "heun", "steps": 3},
    "evaluate": {"extractor": "breed", "samples": 52},
}


def make_checkpoint(path: Path, seed: int = 0, **model: Any) -> Checkpoint:
    """Random weights, also where the initialisation is zero: an untouched network would hide every difference."""
    config = load({"model": TINY["model"] | model, "data": {"image_size": (TINY["model"] | model)["image_size"]}}).model
    torch.manual_seed(seed)
    network = TinyDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_generator(path, network.state_dict(), config, CLASSES, step=7, facts={"ema_decay": 0.9})


def make_report(path: Path, runtime: str, kid: float, **conditions: Any) -> FidelityReport:
    metrics = {"fd_breed": 12.3456, "kid_breed": kid, "kid_breed_std": 0.00123, "is_breed": None, "recall": 0.4321}
    facts = {
        "metrics": metrics,
        "floor": {**dict.fromkeys(metrics, 0.0111), "is_breed": None},
        "conditions": {"count": 52, "split": "test", "extractor": "breed", "runtime": runtime, **conditions},
        "notes": ("is_breed is not given: the test leaves it out.",),
    }
    write_json(path, facts)
    return FidelityReport(path=path, sha256=sha256_of(path), **facts)


@pytest.fixture(scope="session")
def config() -> ReleaseConfig:
    return load(TINY)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("training")
    (folder / "log.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    return make_checkpoint(folder / "ema.safetensors")


@pytest.fixture(scope="session")
def fp32(checkpoint: Checkpoint, config: ReleaseConfig, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export.export_denoiser(checkpoint, config.export, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def int8(fp32: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export.quantize(fp32, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def dataset(config: ReleaseConfig, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return data.prepare(config.data, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def parts(
    config: ReleaseConfig,
    checkpoint: Checkpoint,
    fp32: OnnxModel,
    int8: OnnxModel,
    dataset: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The arguments of `bundle.build`, but for the registry."""
    folder = tmp_path_factory.mktemp("parts")
    network, header = load_generator(checkpoint.path)
    labels = sampling.labels_like(data.load_split(dataset, "test")[1], 52, len(CLASSES))
    settings = {"model": checkpoint.sha256, "runtime": "pytorch"}
    decision = folder / "decision.json"
    terms = ({"name": "kid_not_worse", "value": 0.0345, "bar": 0.0456, "passed": True, "why": "lower than before"},)
    write_json(decision, {"promoted": True})
    return {
        "config": config,
        "dataset": dataset,
        "checkpoint": checkpoint,
        "samples": sampling.generate(network, labels, 16, 13, config.sample, folder / "samples.safetensors", settings),
        "report": make_report(folder / "report.json", "pytorch", 0.0345, weights=f"read from {folder}/weights.pth"),
        "decision": Decision(path=decision, sha256=sha256_of(decision), promoted=True, terms=terms, baseline="0123456789ab"),
        "models": [export.check(checkpoint, model, config.export, folder) for model in (fp32, int8)],
        "classifier": None,
        "baseline": make_report(folder / "baseline.json", "pytorch", 0.0399),
        "onnx_reports": [make_report(folder / "int8.json", "onnx-int8", 0.0351)],
    }
