"""Evaluate a model: within a release, as its baseline and its ONNX file; and alone, for a finished release."""

import argparse
import sys
from typing import NamedTuple

from prefect import flow

from flows.form import Overrides
from flows.shell import add_settings, run
from tasks.data import compare_data, locate_data, prepare_data
from tasks.evaluation import measure, present
from tasks.preflight import check_inputs
from tasks.publishing import open_release
from tasks.sampling import generate_samples
from tinycats_core.config import ReleaseConfig, SampleConfig
from tinycats_core.presets import parse_overrides
from tinycats_core.records import Dataset, FidelityReport, OnnxModel, Release, SampleSet, Weights
from tinycats_core.release import shipped


class Evaluation(NamedTuple):
    """Images drawn from a model, and their report."""

    samples: SampleSet
    report: FidelityReport


def evaluate(
    model: Weights | OnnxModel,
    sample: SampleConfig,
    dataset: Dataset,
    config: ReleaseConfig,
    classifier: Weights | None,
    occasion: str = "release",
) -> Evaluation:
    """Draw images from a model and measure them against the test images, once for each occasion."""
    judging = config.evaluate
    samples = generate_samples(model, dataset, sample, judging.samples, config.compute, occasion, judging.other_share)
    return Evaluation(samples, measure(samples, dataset, judging, classifier, config.compute))


def evaluate_published(release: Release, dataset: Dataset, config: ReleaseConfig, classifier: Weights | None) -> Evaluation:
    """Measure a published release like a candidate, with its own weights and guidance: the baseline of the gate."""
    return evaluate(shipped.generator(release), shipped.sample(release, config.sample), dataset, config, classifier)


@flow(name="evaluate-model")
def evaluate_model(release: str, overrides: Overrides = None) -> FidelityReport:
    """Measure a release again, with its own weights, configuration, guidance and classifier.

    Args:
        release: a release folder, or hub:owner/name.
        overrides: nested settings on top of the release's own, such as {"sample": {"guidance": 2.0}}.
    """
    opened = open_release(release)
    config = shipped.config(opened, overrides)
    sample = config.sample.single()
    config = locate_data(opened, config)
    check_inputs(config)
    dataset = compare_data(opened, prepare_data(config.data))
    config = config.for_classes(len(dataset.classes))
    samples, report = evaluate(shipped.generator(opened), sample, dataset, config, shipped.classifier(opened))
    return present(report, samples, dataset, f"{opened.name} {opened.version}")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow from a shell. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.evaluate_model", description=evaluate_model.description)
    parser.add_argument("release", help="a release folder, or hub:owner/name")
    add_settings(parser, '{"sample": {"guidance": 2.0}}', preset=False)
    given = parser.parse_args(arguments)
    return run(lambda: evaluate_model(given.release, parse_overrides(given.overrides)))


if __name__ == "__main__":
    sys.exit(main())
