"""The small frozen records that travel between tasks: a path, its sha256, facts. Never tensors, clients or tokens."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from tinycats_core.config import Part, ReleaseConfig, SampleConfig
from tinycats_core.errors import TinycatsError
from tinycats_core.files import digest_of, sha256_of


class Record(BaseModel):
    """What a stage left behind, known by its content.

    Two records with equal content digests are the same thing wherever they lie, which is what the stages' cache keys are
    made of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def files(self) -> "tuple[FileRecord, ...]":
        """The files that the record stands for."""

    def verify(self) -> Self:
        """Return the record if its files are there and unchanged. Raises TinycatsError."""
        for file in self.files:
            file.verify()
        return self

    def is_intact(self) -> bool:
        """Return whether `verify` would pass."""
        return all(file.is_intact() for file in self.files)

    @property
    def content(self) -> str:
        """The digest of the record without its paths: what it is, not where it lies."""
        return digest_of(_without_paths(self.model_dump(mode="json")))


class FileRecord(Record):
    """One file: `path` says where it is now, `sha256` what it is."""

    path: Path
    sha256: str

    @property
    def files(self) -> "tuple[FileRecord, ...]":
        return (self,)

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


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key not in ("path", "folder")}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value


class Dataset(FileRecord):
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


class Weights(FileRecord):
    """What a network has learnt, in safetensors, with its configuration in the file's metadata."""

    kind: str  # "generator" | "classifier"
    step: int
    facts: dict[str, float | int | str | None] = {}

    def in_folder(self, folder: Path) -> Self:
        """Return the record of the same file in another folder."""
        return self.model_copy(update={"path": folder / self.path.name})


class Trained(Record):
    """What a training of the generator leaves behind."""

    averages: tuple[Weights, ...]  # EMA weights for each of train.ema_decays, at the last snapshot, then at each earlier one
    raw: Weights  # the last weights, which are compared with and never shipped

    @property
    def ema(self) -> Weights:
        """The EMA weights of the first decay, at the end."""
        return self.averages[0]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return (*self.averages, self.raw)

    def in_folder(self, folder: Path) -> Self:
        """Return the record of the same files in another folder."""
        averages = tuple(weights.in_folder(folder) for weights in self.averages)
        return self.model_copy(update={"averages": averages, "raw": self.raw.in_folder(folder)})


class SweepRow(Part, extra="allow"):
    """One average with one guidance, measured on the validation images. The metrics are extra fields, by their names."""

    chosen: bool = False
    step: int | None = None  # None in a release of before there were snapshots
    copies: bool = False  # whether a copy rate is above its bar, so that it cannot be chosen
    ema_decay: float | int | str | None
    guidance: float
    guidance_interval: tuple[float, float]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics by name."""
        return self.model_extra or {}


class Course(Part):
    """The snapshots of a training that were measured on the way, and why it ended before its last step; None if it did not."""

    rows: tuple[SweepRow, ...] = ()
    ended: str | None = None


class Choice(FileRecord):
    """The average that is shipped and the guidance that it is sampled with, as a JSON file at `path`.

    `rows` has a row for each trial; it is empty if there was a single pair. `ended` says why the training ended early.
    """

    weights: Weights
    sample: SampleConfig
    rule: str
    rows: tuple[SweepRow, ...] = ()
    bars: dict[str, float] = {}  # the highest copy rates that could be chosen, by name
    ended: str | None = None
    note: str | None = None

    def verify(self) -> Self:
        """Return the record if its file and the chosen weights are there and unchanged. Raises TinycatsError."""
        self.weights.verify()
        return super().verify()

    def is_intact(self) -> bool:
        """Return whether `verify` would pass."""
        return super().is_intact() and self.weights.is_intact()


class SampleSet(FileRecord):
    """Generated images in one safetensors file: `images` uint8 (N, 3, S, S), `labels` int64 (N,).

    `settings` holds what made them: model sha256, sampler, steps, guidance, interval, seed, patch size and runtime
    (pytorch | onnx-fp32 | onnx-int8).
    """

    count: int
    settings: dict[str, Any]


class ClassRow(Part, serialize_by_alias=True):
    """The classifier's accuracy on the images of one class: generated ones, and test images as the floor."""

    name: str = Field(validation_alias=AliasChoices("class", "name"), serialization_alias="class")
    breed_accuracy: float | None
    floor: float | None


class GroupFigures(Part):
    """The figures of one group of images, as a report has them, and the conditions in which they differ from its own."""

    name: str
    metrics: dict[str, float | None]
    floor: dict[str, float | None]
    conditions: dict[str, Any]


class FidelityReport(FileRecord):
    """Measured fidelity of one sample set against the held-out images, as a JSON file at `path`.

    `metrics` and `floor` (real training images against the same held-out images; for the copy rates and authenticity the held-out
    images against all training images) have the same keys; a value that cannot be given is None and `notes` says why.
    `conditions` holds N, split, extractor, resize, seed, library version and the sampler's settings. `classes` has a row
    for each class, none without a classifier.

    If `conditions` name a group, the figures are those of that group, the cats, and `groups` has those of the others.
    Otherwise all images are one group.
    """

    metrics: dict[str, float | None]
    floor: dict[str, float | None]
    conditions: dict[str, Any]
    notes: tuple[str, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    groups: tuple[GroupFigures, ...] = Field(default=(), exclude_if=lambda groups: not groups)  # as in earlier reports

    def of_group(self, name: str) -> Self | None:
        """Return the report of another group, with the figures and conditions of that group; None if it was not measured."""
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            return None
        conditions = {**self.conditions, **found.conditions, "group": name}
        return self.model_copy(update={"metrics": found.metrics, "floor": found.floor, "conditions": conditions, "groups": ()})


class Term(Part):
    """One condition of the gate: the measured value, the bar that it is compared with, and the result in words."""

    name: str
    value: float | int | str | None
    bar: float | int | str | None
    passed: bool
    why: str


class Decision(FileRecord):
    """The gate's verdict, as a JSON file at `path`."""

    promoted: bool
    terms: tuple[Term, ...]
    baseline: str | None  # version of the published release it was compared with
    forced: str | None = None  # why a person publishes it although the gate refuses it


class OnnxModel(FileRecord):
    """One ONNX file, of the denoiser, the graph or the classifier, and what was measured of it (size in bytes, parity)."""

    precision: str  # "fp32", "int8", or the name of another candidate
    facts: dict[str, float | int | str | None] = {}


class InferenceReport(FileRecord):
    """How fast each runtime draws images on one machine, as a JSON file at `path`; `inference.measure` says what is in it."""

    facts: dict[str, Any]


class Precision(FileRecord):
    """How the graphs compare, as a JSON file at `path`; `precision.choose` says what is in it."""

    chosen: str
    facts: dict[str, Any]


class WebRuntime(Record):
    """What the page computes with: the files of onnxruntime-web, or the address of a folder that holds them."""

    version: str
    parts: tuple[FileRecord, ...] = ()
    address: str | None = None

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return self.parts


class Picture(FileRecord):
    """A picture for people, as a PNG file."""


class StageCode(Part):
    """The sources that a stage runs, as `source_code` digests them."""

    sha256: str
    core: str  # of the functions of the core alone: the identity of what they make
    files: dict[str, str]
    kept: tuple[str, ...] = ()  # files that have changed since the result was made, which was used all the same

    def differences(self, before: "StageCode") -> list[str]:
        """Return the files in which the code differs from that of another time."""
        return sorted(name for name in self.files.keys() | before.files.keys() if self.files.get(name) != before.files.get(name))


class ParentRelease(Part):
    """The published release that another one was compared with: its version, and the sha256 of its manifest."""

    version: str
    sha256: str


class ReleaseParts(Part):
    """Everything that a release is made of."""

    config: ReleaseConfig
    dataset: Dataset
    choice: Choice
    samples: SampleSet
    report: FidelityReport
    decision: Decision
    models: tuple[OnnxModel, ...]
    graphs: tuple[OnnxModel, ...]  # of the same precisions, and the recommended one
    classifier: Weights | None
    classifier_onnx: OnnxModel | None
    baseline: FidelityReport | None
    onnx_reports: tuple[FidelityReport, ...]  # of what the ONNX files draw; `conditions["runtime"]` says which file
    precision: Precision  # like the next one no parent
    inference: InferenceReport  # no parent: its times differ whenever they are measured, and the release stays what it is
    ema_and_raw: Picture | None  # None: the training left no raw weights
    web_runtime: WebRuntime | None = None  # None: the release has no page
    code: dict[str, StageCode] = Field(default_factory=dict)  # by stage
    parent: ParentRelease | None = None


class Release(FileRecord):
    """A release folder; `path` is its manifest `release.json`, which holds the sha256 of every other file."""

    name: str
    version: str
    location: str  # what a person opens: the folder, or the repository on the Hub
    published: bool = False

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def as_parent(self) -> ParentRelease:
        """What a release says of the published one that it was compared with."""
        return ParentRelease(version=self.version, sha256=self.sha256)
