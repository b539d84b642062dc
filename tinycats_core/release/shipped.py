"""What a finished release holds, as the records that its stages left: to judge it again, and to compare with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinycats_core import presets
from tinycats_core.config import GUIDANCE_SETTINGS, DataConfig, ReleaseConfig, SampleConfig, SampleOptions
from tinycats_core.errors import NAMED, EvaluationError, shortened
from tinycats_core.files import read_json
from tinycats_core.records import Dataset, FidelityReport, OnnxModel, Release, Weights


def config(release: Release, overrides: Mapping[str, Any] | None = None) -> ReleaseConfig:
    """Return a release's configuration, with the guidance that was chosen for it and overrides on top. Raises ConfigError."""
    return presets.load(read_json(release.folder / "config.json"), {"sample": _guidance(release)}, overrides or {})


def sample(release: Release, options: SampleOptions) -> SampleConfig:
    """Return a candidate's way to draw, with the guidance and interval of a release: they belong to it as its weights do."""
    return options.at(**_guidance(release))


def generator(release: Release) -> Weights:
    """Return the record of the generator's weights."""
    return _checkpoint(release, "model.safetensors", "generator")


def classifier(release: Release) -> Weights | None:
    """Return the record of the breed classifier that judged the release, None where none did."""
    name = "classifier.safetensors"
    return _checkpoint(release, name, "classifier") if (release.folder / name).is_file() else None


def onnx_models(release: Release) -> list[OnnxModel]:
    """Return the records of the ONNX files of the denoiser, the smallest last."""
    measured = read_json(release.folder / "benchmark.json")["onnx"]
    names = {precision: f"denoiser-{precision}.onnx" for precision in ("fp32", "int8") if precision in measured}
    return [OnnxModel(**_file(release, name), precision=precision, facts=measured[precision]) for precision, name in names.items()]


def onnx(release: Release) -> OnnxModel:
    """Return the record of the ONNX file whose fidelity is in the release: the smallest one that ships."""
    return onnx_models(release)[-1]


def onnx_report(release: Release) -> FidelityReport:
    """Return what was measured of that ONNX file when the release was made. Raises EvaluationError."""
    runtime = f"onnx-{onnx(release).precision}"
    measured = read_json(release.folder / "metrics.json")["onnx"]
    if runtime not in measured:
        raise EvaluationError(f"{release.folder / 'metrics.json'} has no numbers for {runtime}. Make the release again.")
    return FidelityReport(**_file(release, "metrics.json"), **measured[runtime])


def require_same_data(release: Release, dataset: Dataset) -> Dataset:
    """Return the data set if it is the one that the release was measured against. Raises EvaluationError."""
    require_same_classes(release, dataset)
    if change := other_images(release, dataset):
        raise EvaluationError(f"{change} Restore them, or make a new release.")
    return dataset


def require_same_classes(release: Release, dataset: Dataset) -> None:
    """Raise EvaluationError if the data set has other classes than a release, with what they were renamed to."""
    recorded = read_json(release.folder / "data.json")["classes"]
    if list(dataset.classes) == recorded:
        return
    gone = [name for name in recorded if name not in dataset.classes]
    new = [name for name in dataset.classes if name not in recorded]
    if len(gone) == len(new) == 1:
        what = f"class {gone[0]!r} is named {new[0]!r} now"
    else:
        what = f"missing now: {shortened(gone, NAMED) or 'none'}; new: {shortened(new, NAMED) or 'none'}"
    raise EvaluationError(
        f"the classes are not those of {release.name} {release.version}: {what}. Give the folders their names of then, or make "
        "a new release."
    )


def other_images(release: Release, dataset: Dataset) -> str | None:
    """Say that a data set's images are not those that the release was measured against; None if they are."""
    if dataset.sha256 == (recorded := dataset_sha256(release)):
        return None
    return (
        f"the images have changed since {release.name} {release.version} was made: their sha256 is {dataset.sha256[:12]}…, "
        f"recorded was {recorded[:12]}…. Numbers can only be compared on the same images."
    )


def dataset_sha256(release: Release) -> str:
    """Return the sha256 of the data set that the release was measured against."""
    return read_json(release.path)["parents"]["dataset"]["sha256"]


def recorded_folder(release: Release) -> Path | None:
    """Return data.folder as the configuration of a release gives it: a bare name, below the present folder."""
    return DataConfig.model_validate(read_json(release.folder / "config.json")["data"]).folder


def _guidance(release: Release) -> dict[str, Any]:
    """Return what was chosen for a release; one from before there was a choice has it in its configuration."""
    path = release.folder / "sweep.json"
    settings = read_json(path if path.is_file() else release.folder / "config.json")["sample"]
    return {name: settings[name] for name in GUIDANCE_SETTINGS}


def _checkpoint(release: Release, name: str, kind: str) -> Weights:
    from tinycats_core.tensors import read_header  # here: what draws with onnxruntime needs no PyTorch

    header = read_header(release.folder / name, kind)
    return Weights(**_file(release, name), kind=kind, step=header["step"], facts=header["facts"])


def _file(release: Release, name: str) -> dict[str, Any]:
    path: Path = release.folder / name
    return {"path": path, "sha256": read_json(release.path)["files"][name]["sha256"]}
