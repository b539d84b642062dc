"""The figures of a release, computed again from what it ships: drawn from its smallest ONNX file, and measured like then."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinycats_core.data import groups, preparation
from tinycats_core.device import machine, versions
from tinycats_core.evaluation import fidelity
from tinycats_core.evaluation.samples import draw_samples
from tinycats_core.files import home
from tinycats_core.records import FidelityReport, Release
from tinycats_core.release import contents, shipped

SHARES = ("precision", "recall", "coverage", "distinct", "authenticity", "breed_accuracy")  # of images, without an interval
CHANCE_ERRORS = 3  # standard errors that a share may differ by on another machine
RELATIVE = 0.05  # by which the other metrics may
SAME = ("cpu", "torch_threads", "python", "torch", "onnxruntime")  # what decides the last bits


class Figure(NamedTuple):
    """One metric: what the release says, what it is now, and by how much the two may differ."""

    metric: str
    recorded: float | None
    now: float | None
    difference: float | None
    allowed: float
    why: str  # the reason for `allowed`

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        if self.difference is None:
            return self.recorded is None and self.now is None
        return self.difference <= self.allowed


def measure_again(release: Release, overrides: Mapping[str, Any] | None = None) -> list[Figure]:
    """Draw from the smallest ONNX file of a release, measure, and return each metric beside the recorded one.

    Images are drawn with the settings of the release and compared with the data set that its configuration finds here. On
    the processor and with the versions that it was made with, the figures must be equal to the last bit.

    Args:
        overrides: nested settings on top of those of the release, such as the place of the images.

    Raises:
        ConfigError: the configuration is impossible, or leaves the guidance open.
        EvaluationError: the images here are not those that the release was measured against.
        TinycatsError: the data set or a file of the release cannot be read.
    """
    config = shipped.locate_data(release, shipped.config(release, overrides))
    setting, recorded = config.sample.single(), shipped.onnx_report(release)
    dataset = shipped.require_same_data(release, preparation.prepare(config.data, home("data")))
    config = config.for_classes(len(dataset.classes))
    with tempfile.TemporaryDirectory(prefix="tinycats-") as folder:
        path, count, device = Path(folder, "samples.safetensors"), config.evaluate.samples, config.compute.device
        samples = draw_samples(
            shipped.onnx(release), dataset, setting, count, path, device, other_share=config.evaluate.other_share
        )
        judge = shipped.classifier(release)
        now = fidelity.evaluate(samples, dataset, config.evaluate, judge, home("evaluations"), device)
    return _beside(recorded, now, made_like_here(release))


def _beside(recorded: FidelityReport, now: FidelityReport, same: bool) -> list[Figure]:
    """Return each recorded figure beside the same one of now, group by group.

    A report from before there were groups is of all images.
    """
    if recorded.conditions.get("group") != now.conditions.get("group"):
        now = now.of_group(groups.ALL) or now
    pairs = {"": (recorded, now)}
    for group in recorded.groups:
        before, after = recorded.of_group(group.name), now.of_group(group.name)
        if before and after:
            pairs[f" of {group.name}"] = (before, after)
    return [_figure(metric, *pair, same)._replace(metric=metric + of) for of, pair in pairs.items() for metric in pair[0].metrics]


def made_like_here(release: Release) -> bool:
    """Return whether a release was made on such a processor, with as many threads and with the versions of this machine."""
    then = contents.read(release.folder, "benchmark.json", contents.Benchmark).inference.get("machine")
    here = machine() | versions("torch", "onnxruntime")
    return isinstance(then, dict) and all(then.get(name) == here.get(name) for name in SAME)


def _figure(metric: str, recorded: FidelityReport, now: FidelityReport, same: bool) -> Figure:
    before, after = recorded.metrics.get(metric), now.metrics.get(metric)
    allowed, why = (0.0, "equal to the last bit: same processor, threads and versions") if same else _allowed(metric, recorded)
    difference = None if before is None or after is None else abs(after - before)
    return Figure(metric, before, after, difference, allowed, why)


def _allowed(metric: str, recorded: FidelityReport) -> tuple[float, str]:
    """Return by how much a metric may differ on another machine, and why."""
    value, main = recorded.metrics.get(metric) or 0.0, metric.split("_k5")[0]
    low, high = (recorded.metrics.get(f"{metric}_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        return max(high - value, value - low), "the recorded interval, on another processor or with other versions"
    if main in SHARES:
        count = recorded.conditions.get("generated")
        images = max(count, 1) if isinstance(count, int) else 1
        return CHANCE_ERRORS * math.sqrt(0.25 / images), f"{CHANCE_ERRORS} standard errors of a share of {images:,} images"
    scale = max(abs(value), abs(recorded.metrics.get(f"{metric.rpartition('_')[0]}_drawn_std") or 0.0))
    return RELATIVE * scale, f"{RELATIVE:.0%}, on another processor or with other versions"
