"""The small frozen records that travel between tasks: a path, its sha256, facts. Never tensors, clients or tokens."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from tinycats_core.config import Part, ReleaseConfig, SampleConfig
from tinycats_core.errors import TinycatsError
from tinycats_core.files import digest_of, sha256_of


class Record(BaseModel):
    """A file that a stage left behind, known by its content.

    `path` says where the file is now; `sha256` says what it is. Two records with equal content digests are the same
    thing wherever they lie, which is what the stages' cache keys are made of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    sha256: str

    def verify(self) -> Self:
        """Return the record if the file is there and unchanged.

        Raises:
            TinycatsError: the file is missing, or its bytes are not the recorded ones.
        """
        if not self.path.is_file():
            raise TinycatsError(f"{self.path} is gone. Run the stage that makes it again.")
        found = sha256_of(self.path)
        if found != self.sha256:
            raise TinycatsError(
                f"{self.path} has changed: its sha256 is {found[:12]}…, recorded was {self.sha256[:12]}…. "
                "Delete it and run the stage that makes it again."
            )
        return self

    def is_intact(self) -> bool:
        """Return whether `verify` would pass."""
        return self.path.is_file() and sha256_of(self.path) == self.sha256

    @property
    def content(self) -> str:
        """The digest of the record without its paths: what it is, not where it lies."""
        return digest_of(_without_paths(self.model_dump(mode="json")))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key not in ("path", "folder")}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value


class Dataset(Record):
    """Decoded images in one safetensors file: `train_images`, `train_labels`, and the same for `val` and `test`.

    The networks learn from `train` alone; `val` chooses between them, and `test` judges what was chosen.
    Images are uint8 (N, 3, image_size, image_size) RGB, labels int64 (N,). Beside it lies
    `manifest.json`: source, counts, findings, and a row for each image (name, class, split, sha256 of the source file).
    """

    source: str
    image_size: int
    classes: tuple[str, ...]
    train_count: int
    val_count: int
    test_count: int


class Checkpoint(Record):
    """Weights in safetensors with their configuration in the file's metadata.

    For the generator: EMA weights. For the classifier: the chosen epoch's weights.
    """

    kind: str  # "generator" | "classifier"
    step: int
    facts: dict[str, float | int | str | None] = {}
    averages: tuple["Checkpoint", ...] = ()  # of the same training, over other lengths
    raw: "Checkpoint | None" = None  # the last weights of the same training, which are compared with and never shipped

    @property
    def others(self) -> tuple["Checkpoint", ...]:
        """The other weights of the same training: its averages, and the raw ones."""
        return self.averages + ((self.raw,) if self.raw else ())

    def verify(self) -> Self:
        """Return the record if its file and those of the other weights are there and unchanged. Raises TinycatsError."""
        for other in self.others:
            other.verify()
        return super().verify()

    def is_intact(self) -> bool:
        """Return whether `verify` would pass."""
        return super().is_intact() and all(other.is_intact() for other in self.others)

    def alone(self) -> "Checkpoint":
        """Return the record without the other weights."""
        return self.model_copy(update={"averages": (), "raw": None})

    def in_folder(self, folder: Path) -> "Checkpoint":
        """Return the record of the same files in another folder."""
        averages = tuple(average.in_folder(folder) for average in self.averages)
        raw = self.raw and self.raw.in_folder(folder)
        return self.model_copy(update={"path": folder / self.path.name, "averages": averages, "raw": raw})


class Choice(Record):
    """Which average is shipped and with which guidance it is drawn from, as a JSON file at `path`.

    `rows` holds what was measured of each pair on the validation images; none where there was nothing to choose, or
    nothing to choose by, which is what `note` says.
    """

    checkpoint: Checkpoint
    sample: SampleConfig
    rule: str
    rows: tuple[dict[str, Any], ...] = ()
    note: str | None = None

    def verify(self) -> Self:
        """Return the record if its file and the chosen weights are there and unchanged. Raises TinycatsError."""
        self.checkpoint.verify()
        return super().verify()

    def is_intact(self) -> bool:
        """Return whether `verify` would pass."""
        return super().is_intact() and self.checkpoint.is_intact()


class SampleSet(Record):
    """Generated images in one safetensors file: `images` uint8 (N, 3, S, S), `labels` int64 (N,).

    `settings` holds what made them: model sha256, sampler, steps, guidance, interval, seed, patch size and runtime
    (pytorch | onnx-fp32 | onnx-int8).
    """

    count: int
    settings: dict[str, Any]


class FidelityReport(Record):
    """Measured fidelity of one sample set against the held-out images, as a JSON file at `path`.

    `metrics` and `floor` (real training images against the same held-out images; for copy_rate and authenticity the held-out
    images against all training images) have the same keys; a value that cannot be given is None and `notes` says why.
    `conditions` holds N, split, extractor, resize, seed, library version and the sampler's settings. `classes` has a row for
    each class where a classifier has looked: how often it sees that class in the images that it was asked for, and in
    held-out images of it.
    """

    metrics: dict[str, float | None]
    floor: dict[str, float | None]
    conditions: dict[str, Any]
    notes: tuple[str, ...] = ()
    classes: tuple[dict[str, Any], ...] = ()


class Decision(Record):
    """The gate's verdict as a JSON file at `path`; each term: name, value, bar, passed, why."""

    promoted: bool
    terms: tuple[dict[str, Any], ...]
    baseline: str | None  # version of the published release it was compared with


class OnnxModel(Record):
    """One ONNX file, of the denoiser or the classifier, and what was measured of it (size in bytes, parity)."""

    precision: str  # "fp32" | "int8"
    facts: dict[str, float | int | str | None] = {}


class InferenceReport(Record):
    """How fast each runtime draws images on one machine, as a JSON file at `path`; `inference.measure` says what is in it."""

    facts: dict[str, Any]


class Picture(Record):
    """A picture for people, as a PNG file."""


class ReleaseParts(Part):
    """Everything that a release is made of."""

    config: ReleaseConfig
    dataset: Dataset
    choice: Choice
    samples: SampleSet
    report: FidelityReport
    decision: Decision
    models: tuple[OnnxModel, ...]
    classifier: Checkpoint | None
    classifier_onnx: OnnxModel | None
    baseline: FidelityReport | None
    onnx_reports: tuple[FidelityReport, ...]  # of what the ONNX files draw; `conditions["runtime"]` says which file
    inference: InferenceReport  # no parent: its times differ whenever they are measured, and the release stays what it is
    ema_and_raw: Picture | None  # None where the training has left no raw weights


class Release(Record):
    """A release folder; `path` is its manifest `release.json`, which holds the sha256 of every other file."""

    name: str
    version: str
    location: str  # what a person opens: the folder, or the repository on the Hub
    published: bool = False

    @property
    def folder(self) -> Path:
        return self.path.parent
