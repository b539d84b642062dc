"""What a finished release holds, as the records that its stages left: to judge it again, and to compare with it.

A stranger may have made it: each file is read through its model in `contents`, and what a release says about the machine
that reads it does not count.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tinycats_core import presets
from tinycats_core.config import GUIDANCE_SETTINGS, PLACES, ReleaseConfig, SampleConfig, SampleOptions
from tinycats_core.errors import NAMED, ConfigError, EvaluationError, RegistryError, printable, shortened
from tinycats_core.files import expanded, home, read_json
from tinycats_core.generator import drawing
from tinycats_core.generator.onnx_file import require_self_contained
from tinycats_core.records import Dataset, FidelityReport, OnnxModel, Release, Weights
from tinycats_core.release import contents, hub, manifest
from tinycats_core.release.contents import JSON_LIMIT, read

MACHINE: dict[str, tuple[str, ...] | None] = {  # settings that a release of the Hub does not decide; None: all of the part
    "train": ("resume_from", "start_from"),
    "sample": ("batch_size",),
    "evaluate": ("batch_size",),
    "publish": None,
    "compute": None,
}


def open_release(where: str) -> Release:
    """Return a release folder, or `hub:owner/name`, with every file verified. Raises RegistryError."""
    if not where.startswith("hub:"):
        return manifest.read_release(Path(where))
    release = hub.download_release(where.removeprefix("hub:"), home("downloads"))
    if release is None:
        raise RegistryError(f"{printable(where)} holds no release. Publish one first, or give another repository.")
    return release


def config(release: Release, overrides: Mapping[str, Any] | None = None) -> ReleaseConfig:
    """Return a release's configuration, with the guidance that was chosen for it and overrides on top.

    A release does not say where this machine has its data (see `locate_data`), and one of the Hub not where it computes, nor
    in which batches: that is left to the defaults and the overrides.

    Raises:
        ConfigError: a setting is unknown, impossible or beyond its limit.
        RegistryError: a file holds something else than it should.
    """
    settings = contents.read_settings(release.folder)
    if _from_the_hub(release):
        for part, names in MACHINE.items():
            kept = () if names is None else [name for name in settings.get(part, {}) if name not in names]
            settings[part] = {name: settings[part][name] for name in kept}
    _rename(settings.get("train", {}))
    _require_bare_names(settings.get("data", {}))
    return presets.load({"publish": {"name": release.name}}, settings, {"sample": _guidance(release)}, overrides or {})


def sample(release: Release, options: SampleOptions) -> SampleConfig:
    """Return a candidate's way to draw, with the guidance and interval of a release: they belong to it as its weights do."""
    try:
        return options.at(**_guidance(release))
    except ValidationError as error:
        raise ConfigError(f"the guidance of {release.name} {release.version}: {contents.first_of(error)}") from None


def generator(release: Release) -> Weights:
    """Return the record of the generator's weights."""
    return _checkpoint(release, "model.safetensors", "generator")


def classifier(release: Release) -> Weights | None:
    """Return the record of the breed classifier that judged the release, None where none did."""
    name = "classifier.safetensors"
    return _checkpoint(release, name, "classifier") if (release.folder / name).is_file() else None


def onnx_models(release: Release) -> list[OnnxModel]:
    """Return the records of the ONNX files of the denoiser, the smallest last.

    Raises:
        ExportError: a file is damaged, or refers to a file outside of itself.
        RegistryError: benchmark.json holds something else than it should, or names no ONNX file.
    """
    measured = read(release.folder, "benchmark.json", contents.Benchmark).onnx
    names = {precision: f"denoiser-{precision}.onnx" for precision in ("fp32", "int8") if precision in measured}
    if not names:
        raise RegistryError(f"benchmark.json of {release.name} {release.version} names no ONNX file. Make the release again.")
    records = {precision: _file(release, name) for precision, name in names.items()}
    for record in records.values():
        require_self_contained(record["path"])
    return [OnnxModel(**record, precision=precision, facts=measured[precision]) for precision, record in records.items()]


def onnx(release: Release) -> OnnxModel:
    """Return the record of the ONNX file whose fidelity is in the release: the smallest one that ships."""
    return onnx_models(release)[-1]


def graphs(release: Release) -> list[OnnxModel]:
    """Return the records of the graphs, none in a release from before there were any.

    Raises:
        ExportError: a file is damaged, or refers to a file outside of itself.
        RegistryError: benchmark.json holds something else than it should.
    """
    measured = read(release.folder, "benchmark.json", contents.Benchmark).graphs
    found = [
        OnnxModel(**_file(release, f"cats-{precision}.onnx"), precision=precision, facts=facts)
        for precision, facts in measured.items()
    ]
    for one in found:
        require_self_contained(one.path)
    return found


def graph(release: Release) -> OnnxModel | None:
    """Return the record of the graph that the release recommends, None in a release from before there were graphs.

    Raises:
        ExportError: a file is damaged, or refers to a file outside of itself.
        RegistryError: a file of the release holds something else than it should.
    """
    found = {one.precision: one for one in graphs(release)}
    if (release.folder / drawing.PRECISION).is_file():
        chosen = read(release.folder, drawing.PRECISION, contents.Precision).chosen
        if chosen not in found:
            raise RegistryError(
                f"{drawing.PRECISION} of {release.name} {release.version} recommends {printable(repr(chosen))}, which is "
                "not there. Make the release again."
            )
        return found[chosen]
    return found.get("int8") or found.get("fp32")  # of an earlier release


def onnx_report(release: Release) -> FidelityReport:
    """Return what was measured of that ONNX file when the release was made. Raises EvaluationError and RegistryError."""
    runtime = f"onnx-{onnx(release).precision}"
    measured = read(release.folder, "metrics.json", contents.Metrics).onnx
    if runtime not in measured or not isinstance(measured[runtime].conditions.get("conditions_hash"), str):
        raise EvaluationError(f"{release.folder / 'metrics.json'} has no numbers for {runtime}. Make the release again.")
    return FidelityReport(**_file(release, "metrics.json"), **measured[runtime].model_dump())


def require_same_data(release: Release, dataset: Dataset) -> Dataset:
    """Return the data set if it is the one that the release was measured against. Raises EvaluationError."""
    require_same_classes(release, dataset)
    if change := other_images(release, dataset):
        raise EvaluationError(f"{change} Restore them, or make a new release.")
    return dataset


def require_same_classes(release: Release, dataset: Dataset) -> None:
    """Raise EvaluationError if the data set has other classes than a release, with what they were renamed to."""
    recorded = read(release.folder, "data.json", contents.Data).classes
    if list(dataset.classes) == recorded:
        return
    gone = [printable(name) for name in recorded if name not in dataset.classes]
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
    if dataset.sha256 == (recorded := _dataset_sha256(release)):
        return None
    return (
        f"the images have changed since {release.name} {release.version} was made: their sha256 is {dataset.sha256[:12]}…, "
        f"recorded was {recorded[:12]}…. Numbers can only be compared on the same images."
    )


def locate_data(release: Release, config: ReleaseConfig) -> ReleaseConfig:
    """Return a release's configuration with the folder of its photos and the file of their boxes: a release holds the names.

    They are those from which this machine has prepared these very images; for a release that does not come from the Hub,
    otherwise those of the same names below the present folder.

    Raises:
        ConfigError: the folder or the file is not found.
    """
    settings = contents.read_settings(release.folder).get("data", {})
    wanted = [name for name in PLACES if settings.get(name) and getattr(config.data, name) == expanded(settings[name])]
    if not wanted:
        return config  # none, or others that were given
    from tinycats_core.data import preparation  # here, for it needs PyTorch

    found = preparation.find_places(_dataset_sha256(release), home("data"))
    if not _from_the_hub(release):
        found = {name: getattr(config.data, name) for name in wanted} | found
    for name in wanted:
        if name not in found or not found[name].exists():
            things, kind = PLACES[name]
            raise ConfigError(
                f"data.{name} is needed: the {things} of {release.name} {release.version} lay in a {kind} named "
                f'{settings[name]!r}, which is not found on this machine. Give it as overrides: {{"data": {{"{name}": "..."}}}}'
            )
    return config.model_copy(update={"data": config.data.model_copy(update={name: found[name] for name in wanted})})


def _from_the_hub(release: Release) -> bool:
    return "://" in release.location


def _dataset_sha256(release: Release) -> str:
    """Return the sha256 of the data set that the release was measured against."""
    recorded = _manifest(release).parents.get("dataset")
    if recorded is None:
        raise RegistryError(f"{release.name} {release.version} does not say what it was measured against. Make it again.")
    return recorded.sha256


def _require_bare_names(data: Mapping[str, Any]) -> None:
    """Refuse places of data that a release could not have: it keeps the last part of their names, never where they are."""
    for name in PLACES:
        place = data.get(name)
        if place is not None and (not isinstance(place, str) or Path(place).name != place):
            raise ConfigError(
                f"data.{name} is {printable(repr(place))} in config.json; a release names no place outside of itself. "
                f'Give yours with --overrides \'{{"data": {{"{name}": "photos"}}}}\''
            )


def _rename(train: dict[str, Any]) -> None:
    """Give a setting of an earlier version its present name: flips were a setting of their own."""
    if isinstance(train.get("flip"), bool):
        train["augmentation"] = "basic" if train.pop("flip") else "none"


def _guidance(release: Release) -> dict[str, Any]:
    """Return what was chosen for a release; one from before there was a choice has it in its configuration."""
    if (release.folder / "sweep.json").is_file():
        return read(release.folder, "sweep.json", contents.Sweep).sample.model_dump(include=set(GUIDANCE_SETTINGS))
    settings = contents.read_settings(release.folder).get("sample", {})
    if missing := [name for name in GUIDANCE_SETTINGS if name not in settings]:
        raise RegistryError(f"config.json of {release.name} {release.version} has no sample.{missing[0]}. Make the release again.")
    return {name: settings[name] for name in GUIDANCE_SETTINGS}


def _checkpoint(release: Release, name: str, kind: str) -> Weights:
    from tinycats_core.tensors import read_header  # here: what draws with onnxruntime needs no PyTorch

    header = contents.check(read_header(release.folder / name, kind), name, contents.Header)
    return Weights(**_file(release, name), kind=kind, step=header.step, facts=header.facts)


def _file(release: Release, name: str) -> dict[str, Any]:
    files = _manifest(release).files
    if name not in files:
        raise RegistryError(f"{release.name} {release.version} has no {name}. Make the release again.")
    return {"path": release.folder / name, "sha256": files[name].sha256}


def _manifest(release: Release) -> contents.Manifest:
    return contents.check(read_json(release.path, JSON_LIMIT), manifest.NAME, contents.Manifest)
