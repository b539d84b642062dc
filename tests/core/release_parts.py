"""Small networks and reports, made by hand for the tests of what is released."""

from pathlib import Path
from typing import Any

import torch

from tinycats_core.config import CLASSES, SampleConfig
from tinycats_core.files import sha256_of, write_json
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.weights import save_generator
from tinycats_core.presets import load
from tinycats_core.records import Choice, FidelityReport, InferenceReport, Precision, Weights

TINY = {
    "data": {"source": "toycats", "image_size": 16, "toy_train_per_class": 2, "toy_val_per_class": 1, "toy_test_per_class": 2},
    "model": {"image_size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2},
    "sample": {"steps": 3, "guidance": 1.5},
    "evaluate": {"extractor": "breed", "samples": 52},
}
FINISH = {  # the last row of the diary of a completed training
    "event": "finish",
    "step": 7,
    "time": "2026-01-02T03:04:05+00:00",
    "seconds": 4567.8,
    "images": 2304,
    "images_per_s": 0.50441,
    "attempts": 2,
    "seconds_lost": 12.5,
    "device": "cuda: NVIDIA L4",
    "processes": 1,
    "precision": "bf16",
}


def make_checkpoint(path: Path, seed: int = 0, **model: Any) -> Weights:
    """Random weights, also where the initialisation is zero: an untouched network would hide every difference."""
    config = load({"model": TINY["model"] | model, "data": {"image_size": (TINY["model"] | model)["image_size"]}}).model
    torch.manual_seed(seed)
    network = TinyDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_generator(path, network.state_dict(), config, CLASSES, step=7, facts={"ema_decay": 0.9})


def make_choice(path: Path, checkpoint: Weights, sample: SampleConfig) -> Choice:
    row = {
        "step": 7,
        "copies": False,
        "ema_decay": 0.9,
        "guidance": 1.5,
        "guidance_interval": [0.0, 1.0],
        "kid_breed": 0.0444,
        "is_breed": None,
        "copy_rate": 0.01,
        "altered_copy_rate": 0.03,
    }
    other = row | {"guidance": 2.5, "kid_breed": 0.0555, "copy_rate": 0.02, "altered_copy_rate": 0.04, "chosen": False}
    later = row | {"step": 14, "kid_breed": 0.0333, "copy_rate": 0.5, "altered_copy_rate": 0.6, "copies": True, "chosen": False}
    ended = "at step 14 of 21: the images of step 14 are copies of training images"
    facts = {"rule": "the lowest kid_breed", "rows": [later, other, row | {"chosen": True}], "ended": ended, "note": None}
    settings = {"step": 7, "ema_decay": 0.9, "sample": sample.model_dump(mode="json"), "images": 26, "validation_images": 13}
    write_json(path, {**settings, "split": "val", **facts})
    return Choice(
        path=path,
        sha256=sha256_of(path),
        weights=checkpoint,
        sample=sample,
        bars={"copy_rate": 0.1, "altered_copy_rate": 0.2},
        **facts,
    )


def make_inference(path: Path) -> InferenceReport:
    def row(runtime: str, p50: float, p99: float | None) -> dict[str, Any]:
        return {
            "runtime": runtime,
            "device": "cpu",
            "load_ms": 12.75 * p50,
            "latency_ms": {"p50": p50, "p95": 1.5 * p50, "p99": p99},
            "repeats": 80 if p99 is None else 200,
            "images_per_s": {"1": 900 / p50, "4": 1000 / p50, "8": 1100 / p50, "16": 1200 / p50},
            "peak_memory_mb": 3.25 * p50,
            "memory": "growth of the process's resident memory",
        }

    facts = {
        "machine": {"cpu": "A CPU", "cores": 2, "torch_threads": 1, "gpu": None, "torch": "2.0"},
        "sample": SampleConfig(steps=3).model_dump(mode="json", exclude={"batch_size"}),
        "warm_up": 3,
        "rows": [row("pytorch", 31.5, None), row("onnx-fp32", 14.25, 29.375), row("onnx-int8", 7.5, 15.625)],
        "ratios": {"fp32_over_int8": 1.9, "pytorch_over_fp32": 2.21},
        "notes": ["pytorch on cpu has no p99: it takes 100 images, and 80 were drawn; after 4 s no more than 20 are."],
    }
    write_json(path, facts)
    return InferenceReport(path=path, sha256=sha256_of(path), facts=facts)


def make_precision(path: Path) -> Precision:
    def row(name: str, p50: float, delta: float) -> dict[str, Any]:
        group = {"name": "cats", "metrics": {"kid_breed": 0.0345 + delta, "fd_breed": 12.5}, "kid_delta": delta, "kid_bound": 0.004}
        facts = {"name": name, "what": name, "bytes": 1000 * p50, "load_ms": 5.5, "p50_ms": p50, "p95_ms": 1.5 * p50}
        return facts | {"max_abs_diff": 3, "mean_abs_diff": 0.25, "groups": [group], "admissible": True, "chosen": name == "int8"}

    rows = [row("fp32", 14.25, 0.0), row("int8", 7.5, 0.0004)]
    facts = {"chosen": "int8", "rule": "the fastest", "images": 52, "cpu": "A CPU", "vnni": True, "rows": rows}
    write_json(path, facts)
    return Precision(path=path, sha256=sha256_of(path), chosen="int8", facts=facts)


def make_report(path: Path, runtime: str, kid: float, **conditions: Any) -> FidelityReport:
    metrics = {"fd_breed": 12.3456, "kid_breed": kid, "kid_breed_std": 0.00123, "is_breed": None, "recall": 0.4321}
    metrics |= {"kid_breed_low": 0.0321, "copy_rate": 0.0022, "coverage": 0.5678}
    facts = {
        "metrics": metrics,
        "floor": {**dict.fromkeys(metrics, 0.0111), "is_breed": None},
        "conditions": {
            "count": 52,
            "split": "test",
            "extractor": "breed",
            "sampler": {"steps": 3},
            "runtime": runtime,
            **conditions,
        },
        "notes": ("is_breed is not given: the test leaves it out.",),
        "classes": tuple({"class": name, "breed_accuracy": 0.7654, "floor": None} for name in CLASSES),
    }
    write_json(path, facts)
    return FidelityReport(path=path, sha256=sha256_of(path), **facts)
