"""The lineage of a release: what it comes from, link by link, each checked with what ships.

`release.json` names every input by its digests. Most of these inputs do not ship, but what was recorded of them does: a digest
that is computed from the shipped files must be the one in `release.json`, and files must name the same weights and data.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tinycats_core.config import PLACES
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import RegistryError, TinycatsError
from tinycats_core.files import digest_of, read_json
from tinycats_core.records import Dataset, Decision, FidelityReport, FileRecord, OnnxModel, Release, SampleSet, Weights
from tinycats_core.release import contents, manifest, web_runtime
from tinycats_core.release.contents import read

LATER = "tinycats-release/2"  # the first format with a lineage


class Check(NamedTuple):
    """One comparison: what the link before expects, and what was found. None: not recorded."""

    link: str
    what: str
    expected: str | None
    found: str | None

    @property
    def holds(self) -> bool:
        """Whether the link is unbroken."""
        return self.expected == self.found


Pairs = Iterator[tuple[str, str | None, str | None]]  # what is compared, expected, found


class Shipped:
    """The files of a verified release, read once."""

    def __init__(self, release: Release):
        self.folder = release.folder
        self.sealed = read_json(release.path, contents.JSON_LIMIT)
        self.manifest = contents.check(self.sealed, manifest.NAME, contents.Manifest)
        self.later = self.manifest.format == LATER
        self.settings = contents.read_settings(self.folder)
        self.data = read(self.folder, "data.json", contents.Data)
        self.metrics = read(self.folder, "metrics.json", contents.Metrics)
        self.benchmark = read(self.folder, "benchmark.json", contents.Benchmark)
        self.verdict = read(self.folder, "decision.json", contents.Verdict)
        self.drawn = read(self.folder, "samples/metadata.json", contents.Drawn)

    def file(self, name: str) -> str | None:
        """Return the sha256 of a file, None if it does not ship."""
        found = self.manifest.files.get(name)
        return found.sha256 if found else None

    def parent(self, name: str) -> contents.Made | None:
        """Return what is recorded of an input."""
        return self.manifest.parents.get(name)

    def sha256(self, name: str) -> str | None:
        """Return the recorded sha256 of an input."""
        made = self.parent(name)
        return made.sha256 if made else None

    def content(self, name: str, kind: type[FileRecord], /, **fields: Any) -> Pairs:
        """Compare the recorded content digest of an input with that of the record that the shipped files hold."""
        if self.later and (made := self.parent(name)) is not None:
            try:
                record = kind.model_validate({"path": "-", "sha256": made.sha256, **fields})
            except ValidationError as error:
                raise RegistryError(f"the {name} of the release: {contents.first_of(error)}. Make the release again.") from None
            yield f"content of {name}", made.content, record.content


def check(release: Release) -> list[Check]:
    """Return every comparison of a verified release, in the order of the lineage.

    Raises:
        TinycatsError: a file cannot be read back, or holds something else than it should.
    """
    shipped = Shipped(release)
    return [Check(link, *pair) for link, pairs in LINKS.items() for pair in pairs(shipped)]


def first_broken(checks: list[Check]) -> Check | None:
    """Return the first comparison that does not hold."""
    return next((item for item in checks if not item.holds), None)


def inspect(path: Path) -> dict[str, Any]:
    """Return what there is to say of a release, as a JSON value: its files, its lineage and what is wrong.

    `wrong` has a line for each problem and is empty for a release that is as it was made.

    Args:
        path: the release folder, a link to it such as `latest`, or its release.json.
    """
    sealed, wrong = manifest.inspect(path)
    checks: list[Check] = []
    if not wrong:
        try:
            checks = check(manifest.as_record(path.parent if path.name == manifest.NAME else path, sealed))
        except TinycatsError as error:
            wrong = [str(error)]
        if broken := first_broken(checks):
            expected, found = broken.expected or "nothing", broken.found or "nothing"
            wrong = [f"the lineage breaks at {broken.link}: {broken.what} is {found}, expected was {expected}"]
    return {
        "name": sealed.get("name"),
        "version": sealed.get("version"),
        "format": sealed.get("format"),
        "files": len(sealed.get("files") or ()),
        "lineage": [{**item._asdict(), "holds": item.holds} for item in checks],
        "wrong": wrong,
    }


def _data(shipped: Shipped) -> Pairs:
    yield "sha256 in data.json", shipped.sha256("dataset"), shipped.data.sha256
    fields = {name: getattr(shipped.data, name) for name in contents.Data.model_fields}
    yield from shipped.content("dataset", Dataset, **fields)


def _configuration(shipped: Shipped) -> Pairs:
    dataset, settings = shipped.parent("dataset"), shipped.settings
    if not shipped.later or dataset is None or settings.get("train", {}).get("resume_from"):
        return  # older keys are made in other ways, and that of a longer training holds a path that does not ship
    parts = {name: part for name, part in settings.items() if name not in ("compute", "publish")}
    parts["data"] = {name: value for name, value in parts.get("data", {}).items() if name not in PLACES}
    key = digest_of({"config": parts, "name": shipped.manifest.name, "dataset": dataset.content})
    yield "key, of the settings and the data", shipped.manifest.key, key


def _code(shipped: Shipped) -> Pairs:
    yield from _part(shipped, "code")
    for stage, code in (shipped.manifest.code.stages if shipped.manifest.code else {}).items():
        yield f"sources of {stage}", code.sha256, digest_of(code.files)


def _parent(shipped: Shipped) -> Pairs:
    yield from _part(shipped, "parent")
    parent, before = shipped.manifest.parent, shipped.metrics.baseline
    if shipped.later:
        yield "version in decision.json", parent.version if parent else None, shipped.verdict.baseline
    yield "version in metrics.json", shipped.verdict.baseline, before.version if before else None
    if before:
        yield from shipped.content("baseline", FidelityReport, **_figures(before))


def _weights(shipped: Shipped) -> Pairs:
    from tinycats_core.tensors import read_header  # here: PyTorch takes longer to import than a damaged release to be refused

    yield "model.safetensors", shipped.sha256("checkpoint"), shipped.file("model.safetensors")
    header = contents.check(read_header(shipped.folder / "model.safetensors", "generator"), "model.safetensors", contents.Header)
    yield from shipped.content("checkpoint", Weights, kind="generator", step=header.step, facts=header.facts)
    started_from = BaseRelease.parse(str(shipped.settings.get("train", {}).get("start_from")))
    yield "base in release_config.json", shipped.sha256("base"), started_from.sha256 if started_from else None
    yield "base in model.safetensors", shipped.sha256("base"), _named(header.facts, "base")


def _choice(shipped: Shipped) -> Pairs:
    yield "sweep.json", shipped.sha256("choice"), shipped.file("sweep.json")


def _samples(shipped: Shipped) -> Pairs:
    yield "weights in samples/metadata.json", shipped.file("model.safetensors"), _named(shipped.drawn.settings, "model")
    yield from shipped.content("samples", SampleSet, count=shipped.drawn.count, settings=shipped.drawn.settings)
    yield "samples/ema_and_raw.png", shipped.sha256("ema-and-raw"), shipped.file("samples/ema_and_raw.png")


def _metrics(shipped: Shipped) -> Pairs:
    yield from _measured(shipped, "report", shipped.metrics.candidate, "model.safetensors")
    for runtime, measured in shipped.metrics.onnx.items():
        yield from _measured(shipped, f"report-{runtime}", measured, f"denoiser-{runtime.removeprefix('onnx-')}.onnx")


def _measured(shipped: Shipped, name: str, measured: contents.Measured, file: str) -> Pairs:
    """Compare the conditions of a measurement with the weights, the data and the classifier of the release."""
    conditions = measured.conditions
    drawn_by = conditions.get("drawn_by")
    yield f"weights of {name}", shipped.file(file), _named(drawn_by if isinstance(drawn_by, dict) else {}, "model")
    dataset = shipped.parent("dataset")
    yield f"data of {name}", dataset.content if dataset else None, _named(conditions, "dataset")
    yield f"classifier of {name}", shipped.file("classifier.safetensors"), _named(conditions, "classifier_sha256")
    yield from shipped.content(name, FidelityReport, **_figures(measured))


def _onnx(shipped: Shipped) -> Pairs:
    for precision, facts in shipped.benchmark.onnx.items():
        file, name = f"denoiser-{precision}.onnx", f"denoiser-{precision}"
        yield file, shipped.sha256(name), shipped.file(file)
        yield f"weights in {file}", shipped.file("model.safetensors"), _source(shipped, file)
        yield from shipped.content(name, OnnxModel, precision=precision, facts=facts)


def _graphs(shipped: Shipped) -> Pairs:
    for precision, facts in shipped.benchmark.graphs.items():
        file, name = f"cats-{precision}.onnx", f"cats-{precision}"
        yield file, shipped.sha256(name), shipped.file(file)
        made_of = _metadata(shipped, file)
        yield f"weights in {file}", shipped.file("model.safetensors"), made_of.get("source_sha256")
        source = precision if precision in shipped.benchmark.onnx else "fp32"
        yield f"denoiser in {file}", shipped.file(f"denoiser-{source}.onnx"), made_of.get("denoiser_sha256")
        yield from shipped.content(name, OnnxModel, precision=precision, facts=facts)


def _classifier(shipped: Shipped) -> Pairs:
    yield "classifier.safetensors", shipped.sha256("classifier"), shipped.file("classifier.safetensors")
    yield "classifier.onnx", shipped.sha256("classifier-onnx"), shipped.file("classifier.onnx")
    if shipped.file("classifier.onnx"):
        yield "weights in classifier.onnx", shipped.file("classifier.safetensors"), _source(shipped, "classifier.onnx")


def _page(shipped: Shipped) -> Pairs:
    file = f"demo/runtime/{web_runtime.WASM}"
    linked = shipped.file("demo/index.html") and not shipped.file("cats.html")
    if not linked:
        yield file, shipped.sha256("web-runtime"), shipped.file(file)


def _decision(shipped: Shipped) -> Pairs:
    verdict = shipped.verdict.model_dump(include={"promoted", "terms", "baseline", "forced"})
    yield from shipped.content("decision", Decision, **verdict)


def _version(shipped: Shipped) -> Pairs:
    made: dict[str, Any] = {"key": shipped.manifest.key, "parents": shipped.sealed["parents"]}
    if shipped.manifest.code is not None:
        made["code"] = {stage: code.sha256 for stage, code in shipped.manifest.code.stages.items()}
    yield "version, of the key, the inputs and the code", shipped.manifest.version, digest_of(made)[:12]


def _part(shipped: Shipped, name: str) -> Pairs:
    """Compare a part of the manifest with its digest in the lineage."""
    if shipped.later:
        named, value = shipped.manifest.lineage.get(name), shipped.sealed[name]
        yield f"{name} in release.json", named.sha256 if named else None, None if value is None else digest_of(value)


def _files(shipped: Shipped) -> Pairs:
    if shipped.later:
        found = manifest.lineage(shipped.sealed)
        yield "lineage in release.json", digest_of(found), digest_of(shipped.sealed["lineage"])


def _source(shipped: Shipped, file: str) -> str | None:
    """Return the weights that an ONNX file says it was made of."""
    return _metadata(shipped, file).get("source_sha256")


def _metadata(shipped: Shipped, file: str) -> dict[str, str]:
    """Return what an ONNX file says of itself, nothing if it does not ship."""
    from tinycats_core.generator.onnx_file import require_self_contained

    return require_self_contained(shipped.folder / file) if shipped.file(file) else {}


def _named(facts: Mapping[str, Any], name: str) -> str | None:
    value = facts.get(name)
    return value if isinstance(value, str) else None


def _figures(measured: contents.Measured) -> dict[str, Any]:
    return measured.model_dump(include={"metrics", "floor", "conditions", "notes", "classes", "groups"})


LINKS: dict[str, Callable[[Shipped], Pairs]] = {
    "data": _data,
    "configuration": _configuration,
    "code": _code,
    "environment": lambda shipped: _part(shipped, "environment"),
    "parent": _parent,
    "weights": _weights,
    "choice": _choice,
    "samples": _samples,
    "metrics": _metrics,
    "onnx": _onnx,
    "graphs": _graphs,
    "classifier": _classifier,
    "page": _page,
    "decision": _decision,
    "version": _version,
    "files": _files,
}
