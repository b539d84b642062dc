"""The breed classifier alone: the same stage, and the same result, as inside a release."""

import argparse
import sys

from prefect import flow

from flows.form import Overrides, Preset
from flows.shell import add_settings, run, settings
from tasks import training
from tasks.data import prepare_data, validate_data
from tasks.export import export_classifier
from tasks.preflight import check_compute, check_images, configure
from tasks.runs import log, tally
from tinycats_core.records import Weights


@flow(name="train-classifier")
def train_classifier(preset: Preset = "smoke", overrides: Overrides = None) -> Weights:
    """Train the network that tells the breeds, on the data of a preset.

    Args:
        preset: smoke, photos, standard, budget, high-accuracy, aggressive or max-quality.
        overrides: nested settings on top of the preset, such as {"classifier": {"epochs": 10}}.
    """
    config = configure(preset, overrides)
    check_compute(config.compute)
    check_images(config.data)
    dataset = prepare_data(config.data)
    validate_data(dataset, config.data)
    classifier = training.train_classifier(dataset, config.classifier, config.compute)
    exported = export_classifier(classifier, dataset, config.export)
    log().info("%s, %s: %s; %s", classifier.path, exported.path, classifier.facts, tally())
    return classifier


def main(arguments: list[str] | None = None) -> int:
    """Run the flow from a shell. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.train_classifier", description=__doc__)
    add_settings(parser, '{"classifier": {"epochs": 10}}')
    given = parser.parse_args(arguments)
    return run(lambda: train_classifier(**settings(given)))


if __name__ == "__main__":
    sys.exit(main())
