"""The splits of a prepared data set, as tensors."""

from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.files import read_json
from tinycats_core.records import Dataset

Split = Literal["train", "val", "test"]


def load_split(dataset: Dataset, split: Split) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, S, S) and labels int64 (N,) of one split.

    The file's bytes are trusted: a stage verifies its arguments.

    Raises:
        TinycatsError: the file is missing.
    """
    return _tensor(dataset, f"{split}_images"), load_labels(dataset, split)


def load_labels(dataset: Dataset, split: Split) -> Tensor:
    """Return the labels int64 (N,) of one split, without its images. Raises TinycatsError."""
    return _tensor(dataset, f"{split}_labels")


def _tensor(dataset: Dataset, name: str) -> Tensor:
    if not dataset.path.is_file():
        raise TinycatsError(f"{dataset.path} is gone. Run the stage that makes it again.")
    with safe_open(dataset.path, framework="pt") as file:
        return file.get_tensor(name)


def read_manifest(dataset: Dataset) -> dict[str, Any]:
    """Return the manifest beside the data set: source, classes, counts, findings, a row for each image.

    Raises:
        TinycatsError: the manifest is missing or damaged, or does not belong to the data set.
    """
    path = dataset.path.with_name("manifest.json")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("sha256") != dataset.sha256:
        raise DataError(f"{path} does not belong to {dataset.path}. Delete {path.parent} and prepare the data again.")
    return manifest
