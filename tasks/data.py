"""The data stages: decode the images once, and look for what would spoil training."""

from tasks import show
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.config import DataConfig, ReleaseConfig
from tinycats_core.data import preparation, validation
from tinycats_core.data.validation import ValidationReport
from tinycats_core.files import home
from tinycats_core.records import Dataset, Release
from tinycats_core.release import shipped


@stage(preparation.prepare, beside=("manifest.json",))
def prepare_data(config: DataConfig) -> Dataset:
    """Decode the images once into one tensor file, downloading them first where they come from the network."""
    log().info("preparing %s at %d px", config.folder or config.source, config.image_size)
    bar = show.progress("data-progress", "Decoding the images")
    dataset = preparation.prepare(config, home("data"), on_progress=bar)
    bar(1.0, "done")
    counts = dataset.train_count, dataset.val_count, dataset.test_count
    log().info("%d training, %d validation and %d test images in %s", *counts, dataset.path.parent)
    return dataset


@stage(validation.validate)
def validate_data(dataset: Dataset, config: DataConfig) -> ValidationReport:
    """Fail on what would spoil training; warn of the rest."""
    import pandas as pd

    report = validation.validate(dataset, config)
    frame = pd.DataFrame(list(report.rows))
    counted = f"files in no class: {report.outside}, hidden files: {report.hidden}"
    show.table("data-set", frame, f"{dataset.source}: files and images of each class; {counted}")
    log().info("%s:\n%s\n%s", dataset.source, frame.to_string(index=False), counted)
    for warning in report.warnings:
        log().warning(warning)
    if report.findings:
        log().info("all findings: %s", report.findings)
    if report.warnings:
        show.markdown("data-warnings", "\n".join(f"- {warning}" for warning in report.warnings), "Warnings of the data check")
    return report


def locate_data(release: Release, config: ReleaseConfig) -> ReleaseConfig:
    """Return a release's configuration with the folder of its photos: a release holds no more than the folder's name."""
    return shipped.locate_data(release, config)


def compare_data(release: Release, dataset: Dataset) -> Dataset:
    """Return the data set, with a warning if its images are not those of the release; other classes are an error."""
    shipped.require_same_classes(release, dataset)
    if change := shipped.other_images(release, dataset):
        log().warning(change)
    return dataset
