"""A release folder: the weights, the ONNX files, what was measured of them, and a manifest over all of it."""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from tinycats_core.config import PLACES, ReleaseConfig
from tinycats_core.data import sources
from tinycats_core.data.splits import Split, load_split, read_manifest
from tinycats_core.errors import RegistryError
from tinycats_core.evaluation.memorization import neighbour_sheet
from tinycats_core.files import atomic_path, digest_of, read_json, write_json, write_text
from tinycats_core.generator import drawing
from tinycats_core.generator.sampling import load_samples
from tinycats_core.pictures import contact_sheet, course, sheet_names
from tinycats_core.records import (
    Choice,
    Dataset,
    Decision,
    FidelityReport,
    FileRecord,
    OnnxModel,
    Release,
    ReleaseParts,
    SampleSet,
    WebRuntime,
    Weights,
)
from tinycats_core.release import card, contents, page, signature, web_runtime
from tinycats_core.release.manifest import inspect, read_release, seal
from tinycats_core.release.registry import open_registry
from tinycats_core.training.base_weights import base_record

GRID_PER_CLASS = 8
BREED_SHEET = 40  # images on the sheet of one breed
TRAINING = {  # files beside the weights, and their names in a release
    "log.jsonl": "training_log.jsonl",
    "diary.jsonl": "training_diary.jsonl",
    "cost.json": "training_cost.json",
}
ROOTS = re.compile(r"(?<![\w:/.~-])~?(?:/[^\s/'\",;:|]+)+/(?=[^\s/])")  # the folders of an absolute path


def release_key(config: ReleaseConfig, dataset: Dataset) -> str:
    """Return a digest of the configuration and the data. Where a release is made, published or has its data is left out."""
    parts = config.model_dump(mode="json", exclude={"compute": True, "publish": True, "data": {*PLACES}})
    return digest_of({"config": parts, "name": config.publish.name, "dataset": dataset.content})


def build(registry: Path, parts: ReleaseParts) -> Release:
    """Write `<registry>/<name>/<version>/` in one step and return its record, not yet published.

    The version follows from the parents and the code: the same ones give the same version, and an intact one is
    returned untouched. A damaged one is moved aside, to `<version>.damaged-…`, and made again.

    Raises:
        RegistryError: the registry cannot be used or written.
    """
    config, dataset, name = parts.config, parts.dataset, parts.config.publish.name
    open_registry(registry)
    parents = _parents(parts)
    key = release_key(config, dataset)
    code = {name: item.sha256 for name, item in parts.code.items()}
    kept = {name: item.kept for name, item in parts.code.items() if item.kept}
    version = digest_of({"key": key, "parents": parents, "code": code})[:12]
    target = registry / name / version
    _, wrong = inspect(target)
    if not wrong:
        signature.ensure_signed(target, parts.config.publish)
        return read_release(target)
    try:
        if target.exists():
            _set_aside(target, wrong)
        with atomic_path(target, replace=False) as folder:
            (folder / "samples").mkdir(parents=True)
            _copy_files(folder, parts)
            _write_facts(folder, parts)
            _write_samples(folder / "samples", parts.samples, dataset)
            _draw_course(folder / "samples" / "course.png", parts.choice, config.evaluate.extractor)
            if parts.web_runtime is not None:
                page.write(folder, parts.web_runtime, name, version)
            write_text(folder / "README.md", card.model_card(folder, name, version, kept, _repo_id(config)))
            seal(folder, name, version, key, parents, parts.code, parts.parent)
    except OSError as error:
        if not inspect(target)[1]:  # another process made the same release meanwhile
            return read_release(target)
        raise RegistryError(
            f"cannot write the release to {target}: {error.strerror or error}. Make room or give another publish.folder."
        ) from error
    signature.ensure_signed(target, parts.config.publish)
    return read_release(target)


def _parents(parts: ReleaseParts) -> dict[str, dict[str, str] | None]:
    """Return what each record is that a release is made of."""
    made_of: dict[str, FileRecord | None] = {
        "dataset": parts.dataset,
        "checkpoint": parts.choice.weights,
        "base": parts.config.train.base and base_record(parts.config.train.base),
        "choice": parts.choice,
        "samples": parts.samples,
        "report": parts.report,
        "decision": parts.decision,
        "classifier": parts.classifier,
        "classifier-onnx": parts.classifier_onnx,
        "baseline": parts.baseline,
        "ema-and-raw": parts.ema_and_raw,
        **{f"denoiser-{model.precision}": model for model in parts.models},
        **{f"cats-{graph.precision}": graph for graph in parts.graphs},
        **{f"report-{_runtime(item)}": item for item in parts.onnx_reports},
    }
    parents = {name: part and {"sha256": part.sha256, "content": shipped_content(part)} for name, part in made_of.items()}
    return parents | ({"web-runtime": runtime_parent(parts.web_runtime)} if parts.web_runtime else {})


def runtime_parent(runtime: WebRuntime) -> dict[str, str]:
    """Return what a release records of the runtime of its page."""
    return {"sha256": web_runtime.SHA256[web_runtime.WASM], "content": runtime.content}


def shipped_content(record: FileRecord) -> str:
    """Return the content digest of a record as it ships: `lineage.check` computes it again from the release's files."""
    return type(record).model_validate(portable(record.model_dump(mode="json")) | {"path": record.path}).content


def _set_aside(target: Path, wrong: Sequence[str]) -> None:
    aside = target.with_name(f"{target.name}.damaged-{digest_of([target.stat().st_mtime_ns, wrong])[:8]}")
    target.rename(aside)
    logging.getLogger(__name__).warning("%s was damaged (%s); it is now %s", target, "; ".join(wrong), aside.name)


def _copy_files(folder: Path, parts: ReleaseParts) -> None:
    """Copy what is shipped as it is."""
    weights = parts.choice.weights
    files: dict[str, FileRecord | None] = {
        "model.safetensors": weights,
        "sweep.json": parts.choice,
        **{f"denoiser-{model.precision}.onnx": model for model in parts.models},
        **{f"cats-{graph.precision}.onnx": graph for graph in parts.graphs},
        "classifier.safetensors": parts.classifier,
        "classifier.onnx": parts.classifier_onnx,
        "samples/ema_and_raw.png": parts.ema_and_raw,
    }
    for file, part in files.items():
        if part is not None:
            shutil.copyfile(part.path, folder / file)
    shutil.copyfile(drawing.__file__, folder / "sample.py")
    source = sources.find(parts.dataset.source)
    write_text(folder / "LICENSE", (source.licence_text or source.note).strip() + "\n")
    for name, shipped_as in TRAINING.items():
        if (beside := weights.path.with_name(name)).is_file():
            write_text(folder / shipped_as, portable(beside.read_text(encoding="utf-8")))


def _write_facts(folder: Path, parts: ReleaseParts) -> None:
    """Write what was measured and decided, as JSON files and one table."""
    weights = parts.choice.weights
    facts = {
        "config.json": _shape(parts),
        contents.SETTINGS: _settings(parts.config),
        "data.json": _data(parts.dataset),
        "metrics.json": _metrics(parts.report, parts.decision, parts.baseline, parts.onnx_reports),
        "benchmark.json": {
            "onnx": {model.precision: model.facts for model in parts.models},
            "graphs": {graph.precision: graph.facts for graph in parts.graphs},
            "inference": parts.inference.facts,
            "training": {"step": weights.step, **weights.facts},
            "classifier": parts.classifier and parts.classifier.facts,
        },
        drawing.PRECISION: parts.precision.facts,
        "decision.json": parts.decision.model_dump(mode="json", exclude={"path", "sha256"}),
    }
    if parts.classifier is not None:
        facts["classifier.json"] = _classifier(parts.classifier, parts.classifier_onnx)
    for file, value in facts.items():
        write_json(folder / file, portable(value))
    _metrics_frame(facts["metrics.json"]).to_csv(folder / "metrics.csv", index=False)


def _repo_id(config: ReleaseConfig) -> str | None:
    """Return where a release will be on the Hub; with OWNER in place of an owner that only the token knows."""
    if config.publish.to != "hub":
        return None
    return config.publish.repo_id or f"OWNER/{config.publish.name}"


def _shape(parts: ReleaseParts) -> dict[str, Any]:
    """Return what the generator is, in the flat form in which the Hub and its mixin read a `config.json`."""
    return {
        "model_type": "tinydit",
        "library_name": "tinycats",
        **parts.config.model_dump(mode="json")["model"],
        "classes": list(parts.dataset.classes),
        "sampling": parts.choice.sample.model_dump(mode="json", exclude={"batch_size"}),
    }


def _settings(config: ReleaseConfig) -> dict[str, Any]:
    """Return the settings of every stage, without where it was made and published and where its data lie."""
    settings = config.model_dump(mode="json", exclude={"compute", "publish"})
    settings["data"] |= {name: Path(settings["data"][name]).name for name in PLACES if settings["data"][name]}
    if settings["train"]["resume_from"]:
        settings["train"]["resume_from"] = Path(settings["train"]["resume_from"]).name
    return settings


def _data(dataset: Dataset) -> dict[str, Any]:
    """Return what the data set is: counts by class and split, and how many findings of each kind."""
    manifest = read_manifest(dataset)
    counts = Counter((row["class"], row["split"]) for row in manifest["images"])
    return {
        **dataset.model_dump(mode="json", exclude={"path"}),
        "split": manifest["split"],
        "counts": {name: {split: counts[name, split] for split in get_args(Split)} for name in dataset.classes},
        "findings": dict(Counter(finding["kind"] for finding in manifest["findings"])),
    }


def _classifier(classifier: Weights, model: OnnxModel | None) -> dict[str, Any]:
    """Return what was measured of the classifier when it was trained, and of its ONNX file."""
    report = read_json(classifier.path.with_name("report.json"))
    return {**{name: value for name, value in report.items() if name != "made"}, "onnx": model and model.facts}


def _metrics(
    report: FidelityReport, decision: Decision, baseline: FidelityReport | None, onnx_reports: Sequence[FidelityReport]
) -> dict[str, Any]:
    """Return every measurement: of the candidate, of the published release before it, of what the ONNX files draw."""
    return {
        "candidate": _measured(report),
        "baseline": baseline and {"version": decision.baseline, **_measured(baseline)},
        "onnx": {_runtime(item): _measured(item) for item in onnx_reports},
    }


def _measured(report: FidelityReport) -> dict[str, Any]:
    return report.model_dump(mode="json", include={"metrics", "floor", "conditions", "notes", "classes", "groups"})


def _runtime(report: FidelityReport) -> str:
    return str(report.conditions["runtime"])


def _metrics_frame(metrics: Mapping[str, Any]):
    """Return one row a metric; a column for the candidate, its floor, the release before, each ONNX file and further group."""
    import pandas

    columns = {"candidate": metrics["candidate"]["metrics"], "floor": metrics["candidate"]["floor"]}
    if metrics["baseline"]:
        columns["baseline"] = metrics["baseline"]["metrics"]
    columns |= {name: item["metrics"] for name, item in metrics["onnx"].items()}
    for group in metrics["candidate"].get("groups", ()):
        columns |= {f"candidate, {group['name']}": group["metrics"], f"floor, {group['name']}": group["floor"]}
    frame = pandas.DataFrame(columns, index=pandas.Index(list(columns["candidate"]), name="metric"), dtype=float)
    return frame.reset_index()


def _write_samples(folder: Path, samples: SampleSet, dataset: Dataset) -> None:
    images, labels = load_samples(samples)
    classes, scale, sheets = dataset.classes, max(1, 64 // images.shape[-1]), {}
    for label, (name, file) in enumerate(zip(classes, sheet_names(classes), strict=True)):
        chosen = torch.nonzero(labels == label).flatten()[:BREED_SHEET]
        if len(chosen):
            rows = torch.arange(len(chosen)) // GRID_PER_CLASS
            names = [name] + [""] * int(rows[-1])
            contact_sheet(images[chosen], rows, names, GRID_PER_CLASS, scale).save(folder / f"{file}.png")
            sheets[f"{file}.png"] = {"class": name, "label": label, "indices": chosen.tolist()}
    contact_sheet(images, labels, classes, GRID_PER_CLASS, scale).save(folder / "grid.png")
    if not sources.find(dataset.source).private:
        neighbour_sheet(images, labels, load_split(dataset, "train")[0], classes, scale).save(folder / "neighbours.png")
    facts = {"settings": samples.settings, "count": samples.count, "per_row": GRID_PER_CLASS, "sheets": sheets}
    write_json(folder / "metadata.json", portable(facts))


def _draw_course(path: Path, choice: Choice, extractor: str) -> None:
    """Draw KID and copy rate over the steps of the training, if there is more than one snapshot."""
    if len({row.step for row in choice.rows}) > 1:
        course([row.model_dump() for row in choice.rows], f"kid_{extractor}", choice.bars).save(path)


def portable(value: Any) -> Any:
    """Return a JSON value without the folders of absolute paths: they say who made it and where, and lead nowhere else."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return ROOTS.sub("", value) if isinstance(value, str) else value
