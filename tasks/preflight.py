"""Checks before the first stage: the configuration is valid, and everything it needs is available."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect.blocks.system import Secret

from tasks import show
from tasks.cache import keep_results
from tasks.evaluation import judge_needs_classifier
from tasks.runs import log
from tinycats_core.compute import costs, modal_auth, remote
from tinycats_core.config import BudgetConfig, ComputeConfig, DataConfig, ReleaseConfig
from tinycats_core.data import groups, preparation, sources
from tinycats_core.evaluation import classifier, dinov2, extractors, fidelity
from tinycats_core.evaluation.samples import labels_to_draw
from tinycats_core.files import check_writable, home
from tinycats_core.generator import samplers
from tinycats_core.presets import resolve
from tinycats_core.records import Dataset
from tinycats_core.release import base, history, hub, registry, signature, space, web_runtime
from tinycats_core.training import run_folder, start

ROOT = Path(__file__).resolve().parents[1]
APP_FILES = (ROOT / "deployments" / "modal_app.py", ROOT / "constraints.txt")  # what Modal runs, beside the core


def configure(preset: str, overrides: Mapping[str, Any] | None = None, keep: bool = False) -> ReleaseConfig:
    """Resolve a preset and overrides, and log the result with its digest. With `keep`, results of other code are used."""
    if keep:
        keep_results()
    config = resolve(preset, overrides)
    check_names(config)
    parts = "\n".join(f"  {name}: {json.dumps(part)}" for name, part in config.model_dump(mode="json").items())
    log().info("preset %s, configuration %s:\n%s", preset, config.digest()[:12], parts)
    return config


def check_names(config: ReleaseConfig) -> None:
    """Raise ConfigError if the source or the sampler is unknown, or the source does not go with the other settings."""
    sources.check(config.data)
    samplers.find_sampler(config.sample.sampler)


def check_force(why: str | None) -> str | None:
    """Return the reason for publishing what the gate refuses, on one line. Raises RegistryError if it says nothing."""
    return None if why is None else history.check_why(why)


def find_base(config: ReleaseConfig) -> ReleaseConfig:
    """Return the configuration with the release of `train.start_from` named in full. Raises RegistryError."""
    found = base.resolve(config)
    if found.train.base:
        log().info("the training starts from the weights of %s %s", *found.train.base[:2])
    return found


def check_ready(config: ReleaseConfig) -> None:
    """Raise the TinycatsError of the first thing that is missing, before any stage has run, and log what training costs."""
    check_compute(config.compute)
    if config.publish.to == "hub":
        hub.check_credentials(config.publish)
        if config.publish.space:
            space.check(config.publish)
    web_runtime.find(config.publish, home("web"))  # fetched now, so that its absence is known before hours of training
    registry.open_registry(config.publish.folder)
    check_writable(config.publish.folder)
    check_writable(home())
    signature.check_key(config.publish)
    check_inputs(config)
    if config.train.resume_from is not None:
        run_folder.find_checkpoint(config.train.resume_from)
    if config.budget == BudgetConfig():  # otherwise the budget decides what is trained
        expected = costs.estimate(config.model, config.train, config.compute)
        log().info("to train: %s", expected)
        costs.check_budget(expected, config.compute)


def check_compute(config: ComputeConfig) -> None:
    """Raise a TinycatsError if there is no device or remote GPU to train on."""
    if config.where == "modal":
        find_modal_token()
        remote.check_compute(config, app_files=APP_FILES)
    else:
        start.check_processes(config.device, config.processes)


def find_modal_token() -> None:
    """Take Modal's token from Prefect's Secret blocks `modal-token-id` and `modal-token-secret` if no other is configured."""
    if modal_auth.has_credentials() or not show.in_run():
        return
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        try:
            block = cast(Secret[str], Secret.load(name.lower().replace("_", "-")))
        except ValueError:  # no such block: checking the credentials reports what is missing
            continue
        os.environ[name] = block.get()


def check_images(config: DataConfig) -> None:
    """Raise DataError if the images are missing."""
    preparation.fingerprint(config)


def check_inputs(config: ReleaseConfig) -> None:
    """Raise a TinycatsError if the images or the weights of the feature extractor are missing."""
    check_names(config)
    check_images(config.data)
    if config.evaluate.extractor == "inception":
        extractors.load_inception()  # downloads and checks it now, before hours of training
    if config.evaluate.dinov2_weights:
        dinov2.load_dinov2(config.evaluate.dinov2_weights)


def fit_to_data(config: ReleaseConfig, dataset: Dataset) -> ReleaseConfig:
    """Return the configuration with what the data decide: the number of classes, and the steps if they are given in passes.

    Raises:
        ConfigError: another number of classes was set.
        EvaluationError: the data cannot be evaluated with: before hours of training, not after.
    """
    fitted = config.for_data(len(dataset.classes), dataset.train_count)
    check_judgeable(dataset, fitted)
    if fitted.train.steps < config.train.steps and config.budget.minutes is None:
        expected = costs.estimate(fitted.model, fitted.train, fitted.compute)
        log().info("%g passes over %d photos: to train: %s", config.train.passes, dataset.train_count, expected)
    return fitted


def check_judgeable(dataset: Dataset, config: ReleaseConfig) -> None:
    """Raise EvaluationError if the data cannot be evaluated with."""
    if judge_needs_classifier(config):
        classifier.require_classes(dataset)
    fidelity.require_enough({"training": dataset.train_count, "test": dataset.test_count}, config.evaluate)
    if (share := config.train.other_share) is not None:
        groups.require_other(dataset.classes, "train.other_share", share)
    if (share := config.evaluate.other_share) is not None:
        labels = labels_to_draw(dataset, config.evaluate.samples, share)
        fidelity.require_divided(labels, dataset, config.evaluate)
