"""A mirror of Oxford-IIIT Pet on the Hugging Face Hub: a data set of parquet files with images and labels (`data.mirror`)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from tinycats_core.config import BREEDS
from tinycats_core.data.layout import storable
from tinycats_core.data.oxford_archives import PHOTOS
from tinycats_core.data.splits import Split
from tinycats_core.errors import DataError, printable
from tinycats_core.files import check_writable

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SPLITS: dict[str, Split] = {"train": "train", "test": "test"}  # by what the name of a parquet file begins with
BATCH = 32  # rows that are read at a time
CAT_BREEDS = {name.lower(): name for name in BREEDS}


class Mirror(NamedTuple):
    """The files of a mirror, and the commit that they are from."""

    files: dict[Path, Split]
    commit: str


def fetch_mirror(repo_id: str, folder: Path) -> Mirror:
    """Download the parquet files of a data set on the Hub, as far as `folder` lacks them.

    Raises:
        DataError: the data set cannot be downloaded, or its files are not those of a mirror.
    """
    import httpx2
    from huggingface_hub import constants, snapshot_download

    check_writable(folder)
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT  # the library's own constant is read when it is first imported
    wanted: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": ["*.parquet"], "endpoint": endpoint.rstrip("/")}
    try:
        snapshot = Path(snapshot_download(repo_id, cache_dir=folder, **wanted))
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise DataError(
            f"cannot download data.mirror {repo_id}: {reason}. Check the name, the network and HF_TOKEN, or leave data.mirror out."
        ) from None
    files: dict[Path, Split] = {}
    for path in sorted(snapshot.rglob("*.parquet")):
        if split := SPLITS.get(path.name.partition("-")[0]):
            files[path] = split
    counts = Counter[Split]()
    for path, split in files.items():
        counts[split] += _open(path, repo_id).metadata.num_rows
    if counts != PHOTOS:
        said = " and ".join(f"{counts[split]} of {count} {split}" for split, count in PHOTOS.items())
        raise DataError(
            f"data.mirror {repo_id} has {said} photos: it is no mirror of Oxford-IIIT Pet. Name another, or leave it out."
        )
    return Mirror(files, snapshot.name)


def mirror_photos(mirror: Mirror, repo_id: str) -> Iterator[tuple[str, str, Split, bytes]]:
    """Yield (file name, class, split, bytes) of each photo; cats have their breed as class, dogs are "other".

    Raises:
        DataError: a file is damaged, or its columns are not `image`, with bytes, and `label`, with names.
    """
    for path, split in mirror.files.items():
        file = _open(path, repo_id)
        classes = _classes(file, repo_id)
        for number, row in enumerate(_rows(file, path, repo_id)):
            name, label = _photo(row, classes, f"{split}-{number:05}", repo_id)
            yield name, label, split, row["image"]["bytes"]


def _rows(file: "ParquetFile", path: Path, repo_id: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException

    columns = [name for name in ("image", "label", "image_id") if name in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(BATCH, columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise _damaged(path, repo_id, error) from None


def _photo(row: dict[str, Any], classes: Sequence[str], unnamed: str, repo_id: str) -> tuple[str, str]:
    """Return file name and class of a row."""
    image, label = row["image"], row["label"]
    has_bytes = isinstance(image, dict) and isinstance(image.get("bytes"), bytes)
    if not has_bytes or not isinstance(label, int) or not 0 <= label < len(classes):
        raise DataError(f"data.mirror {repo_id} has a row without bytes of an image, or with label {label!r}. Name another.")
    stem = row.get("image_id") or PurePosixPath(image.get("path") or "").stem or unnamed
    return f"{storable(str(stem))}.jpg", classes[label]


def _open(path: Path, repo_id: str) -> "ParquetFile":
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError("data.mirror needs pyarrow: pip install 'tinycats[mirror]', or leave data.mirror out.") from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise _damaged(path, repo_id, error) from None


def _damaged(path: Path, repo_id: str, error: Exception) -> DataError:
    reason = printable(" ".join(str(error).split()))
    return DataError(f"{path.name} of data.mirror {repo_id} is damaged ({reason}). Delete {path} and run again.")


def _classes(file: "ParquetFile", repo_id: str) -> list[str]:
    """Return the class of each label: the names of labels stand in the metadata that the library `datasets` writes."""
    missing = {"image", "label"} - {*file.schema_arrow.names}
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name).lower().replace(" ", "_") for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        names = []
    if missing or not CAT_BREEDS.keys() <= {*names}:
        raise DataError(
            f"data.mirror {repo_id} has no columns image and label, or its labels have no names of the {len(BREEDS)} breeds of "
            "cats. Name another, or leave it out."
        )
    return [CAT_BREEDS.get(name, "other") for name in names]
