"""The data stages: decode the images once, and look for what would spoil training."""

from tasks import show
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.config import DataConfig
from tinycats_core.data import preparation, validation
from tinycats_core.data.validation import ValidationReport
from tinycats_core.files import home
from tinycats_core.records import Dataset


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
def validate_data(dataset: Dataset, config: DataConfig, num_classes: int) -> ValidationReport:
    """Fail on what would spoil training; warn of the rest."""
    import pandas as pd

    report = validation.validate(dataset, config, num_classes)
    show.table("data-set", pd.DataFrame(list(report.rows)), f"{dataset.source}: images a class")
    for warning in report.warnings:
        log().warning(warning)
    if report.warnings:
        show.markdown("data-warnings", "\n".join(f"- {warning}" for warning in report.warnings), "Warnings of the data check")
    return report
