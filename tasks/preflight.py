"""What is settled before the first stage: the configuration, and that everything it needs is there."""

import json
from collections.abc import Mapping
from typing import Any

from tasks.stage import log
from tinycats_core import costs, data, distributed, fidelity, hub, registry, remote, run_folder
from tinycats_core.config import DataConfig, ReleaseConfig, resolve
from tinycats_core.files import check_writable, home
from tinycats_core.records import Dataset


def configure(preset: str, overrides: Mapping[str, Any] | None = None) -> ReleaseConfig:
    """Resolve a preset and overrides, and log the result with its digest."""
    config = resolve(preset, overrides)
    parts = "\n".join(f"  {name}: {json.dumps(part)}" for name, part in config.model_dump(mode="json").items())
    log().info("preset %s, configuration %s:\n%s", preset, config.digest()[:12], parts)
    return config


def check_ready(config: ReleaseConfig) -> None:
    """Raise the TinycatsError of the first thing that is missing, before any stage has run, and log what training costs."""
    if config.compute.where == "modal":
        remote.check_compute(config.compute)
    else:
        distributed.check_processes(config.compute.device, config.compute.processes)
    if config.publish.to == "hub":
        hub.check_credentials(config.publish)
    registry.open_registry(config.publish.folder)
    check_writable(config.publish.folder)
    check_writable(home())
    check_inputs(config)
    log().info("to train: %s", costs.estimate(config.model, config.train, config.compute))


def check_images(config: DataConfig) -> None:
    """Raise DataError where the images are not there."""
    data.fingerprint(config)


def check_inputs(config: ReleaseConfig) -> None:
    """Raise a TinycatsError where the images, the judge's weights or the checkpoint to go on from are not there."""
    check_images(config.data)
    if config.train.resume_from is not None:
        run_folder.find_checkpoint(config.train.resume_from)
    if config.evaluate.extractor == "inception":
        fidelity.inception_weights()  # downloaded now where they are not: training for hours comes before they are needed


def check_judgeable(dataset: Dataset, config: ReleaseConfig) -> None:
    """Raise EvaluationError where the images are too few to judge by: before hours of training, not after."""
    fidelity.require_enough({"training": dataset.train_count, "test": dataset.test_count}, config.evaluate)
