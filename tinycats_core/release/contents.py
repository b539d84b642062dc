"""What the JSON files of a release may hold: a model for each file that is read back, since a stranger may have written it."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from tinycats_core.config import ReleaseName, SampleConfig
from tinycats_core.errors import RegistryError, printable
from tinycats_core.files import read_json
from tinycats_core.records import ClassRow, SweepRow, Term

JSON_LIMIT = 16 * 2**20  # bytes of one JSON file
MOST_FILES = 10_000
LARGEST_FILE = 2 * 2**30  # bytes: what an ONNX file can have
LARGEST_RELEASE = 8 * 2**30
FORMATS = ("tinycats-release/1", "tinycats-release/2")


def _file_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "." or "\\" in name:
        raise ValueError(f"{printable(name)} is no path below the release")
    if not name.isprintable():
        raise ValueError(f"the name {printable(name)} holds characters that cannot be printed")
    return name


Text = Annotated[str, Field(max_length=10_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_file_name)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Fact = Annotated[int, Field(ge=-(2**63), le=2**63)] | Number | Text | None
Figures = dict[Text, Number | None]


class Content(BaseModel):
    """Part of a JSON file. Fields that are not read may hold anything."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class SealedFile(Content):
    """A file of the manifest."""

    model_config = ConfigDict(extra="forbid")

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, le=LARGEST_FILE)]


class Made(Content):
    """A record that the release is made of, as the manifest names it."""

    model_config = ConfigDict(extra="forbid")

    sha256: Sha256
    content: Sha256


class Code(Content):
    """The sources of one stage, as the manifest names them."""

    model_config = ConfigDict(extra="forbid")

    sha256: Sha256
    files: dict[Text, Text]
    kept: list[Text] = []


class AllCode(Content):
    """The sources of all stages, and the commit that was checked out."""

    model_config = ConfigDict(extra="forbid")

    commit: Text | None
    clean: bool | None
    stages: dict[Text, Code]


class Before(Content):
    """The published release that a release was compared with."""

    model_config = ConfigDict(extra="forbid")

    version: ReleaseName
    sha256: Sha256 | None  # of its release.json


class Link(Content):
    """One link of the lineage: a file of the release, or a part of the manifest, and its digest."""

    model_config = ConfigDict(extra="forbid")

    file: FileName | None
    sha256: Sha256


class Manifest(Content):
    """`release.json`. Releases of the format 1 have no lineage."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[FORMATS]  # pyright: ignore[reportInvalidTypeForm]
    name: ReleaseName
    version: ReleaseName
    created_at: Annotated[str, Field(max_length=64)]
    key: Annotated[str, Field(max_length=128)]
    parents: dict[Text, Made | None]
    code: AllCode | None = None
    environment: dict[Text, Text] = {}
    parent: Before | None = None
    lineage: dict[Text, Link] = {}
    files: Annotated[dict[FileName, SealedFile], Field(min_length=1, max_length=MOST_FILES)]
    digest: Sha256

    @model_validator(mode="after")
    def _has_a_lineage(self) -> Self:
        missing = {"code", "environment", "parent", "lineage"} - self.model_fields_set
        if self.format != FORMATS[0] and missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing in the format {self.format}")
        return self


SETTINGS = "release_config.json"


class Settings(RootModel[dict[Text, dict[Text, Any]]]):
    """`release_config.json`, in earlier releases `config.json`: the settings by part. `presets.load` checks their values."""

    model_config = ConfigDict(frozen=True, strict=True)


class Sweep(Content):
    """`sweep.json`: what was chosen on the validation images."""

    sample: SampleConfig
    rule: Text
    rows: Annotated[list[SweepRow], Field(max_length=10_000)] = []
    ended: Text | None = None
    note: Text | None = None


class Data(Content):
    """`data.json`: the data set."""

    sha256: Sha256
    source: Text
    image_size: Annotated[int, Field(ge=1, le=1024)]
    classes: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=10_000)]
    train_count: Count
    val_count: Count
    test_count: Count


class Group(Content):
    """What was measured of one group of the images."""

    name: Text
    metrics: Figures
    floor: Figures
    conditions: dict[Text, Any]


class Measured(Content):
    """What was measured of one sample set."""

    metrics: Figures
    floor: Figures
    conditions: dict[Text, Any]
    notes: Annotated[list[Text], Field(max_length=1_000)] = []
    classes: Annotated[list[ClassRow], Field(max_length=10_000)] = []
    groups: Annotated[list[Group], Field(max_length=10)] = []


class MeasuredBefore(Measured):
    """What was measured of the published release before."""

    version: Text | None


class Metrics(Content):
    """`metrics.json`."""

    candidate: Measured
    baseline: MeasuredBefore | None
    onnx: dict[Text, Measured]


class Benchmark(Content):
    """`benchmark.json`: of the ONNX files, by precision, and of the machine. Earlier releases have no graphs."""

    onnx: Annotated[dict[Text, dict[Text, Fact]], Field(min_length=1)]
    graphs: dict[Text, dict[Text, Fact]] = {}
    inference: dict[Text, Any] = {}


class Precision(Content):
    """`precision.json`, as much of it as is read back."""

    chosen: Text
    rows: Annotated[list[dict[Text, Any]], Field(max_length=1_000)]


class Verdict(Content):
    """`decision.json`."""

    promoted: bool
    terms: Annotated[list[Term], Field(max_length=1_000)]
    baseline: ReleaseName | None
    forced: Text | None = None


class Drawn(Content):
    """`samples/metadata.json`: the sample set that the grid shows."""

    settings: dict[Text, Any]
    count: Count


class Classifier(Content):
    """`classifier.json`, as much of it as is read back."""

    onnx: dict[Text, Fact] | None


class Header(Content):
    """The header of a weights file, as much of it as every kind has."""

    step: Count
    facts: dict[Text, Fact]


C = TypeVar("C", bound=BaseModel)


def read(folder: Path, file: str, model: type[C]) -> C:
    """Return a JSON file of a release.

    Raises:
        TinycatsError: it is missing, too large or no JSON.
        RegistryError: it holds something else than it should; names the first field.
    """
    return check(read_json(folder / file, JSON_LIMIT), file, model)


def check(value: Any, file: str, model: type[C]) -> C:
    """Return a JSON value as its model. Raises RegistryError, which names the file and the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RegistryError(f"{file} is not as this project writes it: {first_of(error)}. Make the release again.") from None


def first_of(error: ValidationError) -> str:
    """Return the first thing that a model finds wrong, on one line: field, value, what is allowed."""
    item = error.errors(include_url=False)[0]
    if not item["loc"]:
        return printable(item["msg"].removeprefix("Value error, "))
    field = ".".join(printable(part, 60) for part in item["loc"])
    found = "missing" if item["type"] == "missing" else printable(repr(item["input"]), 80)
    return f"{field} is {found}: {printable(item['msg'])}"


def settings_file(folder: Path) -> str:
    """Return the name of the file that holds a release's settings: config.json in earlier releases."""
    return SETTINGS if (folder / SETTINGS).is_file() else "config.json"


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of a release by part. Raises RegistryError."""
    return dict(read(folder, settings_file(folder), Settings).root)
