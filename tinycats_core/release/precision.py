"""Which graph a release recommends: the fastest of those whose images the judge cannot tell from those of fp32."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinycats_core.config import EvaluateConfig, ExportConfig, SampleConfig
from tinycats_core.config.forms import FORMS
from tinycats_core.errors import ExportError
from tinycats_core.evaluation.fidelity import evaluate
from tinycats_core.evaluation.samples import labels_to_draw
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator import drawing, onnx_file
from tinycats_core.records import Dataset, FidelityReport, InferenceReport, OnnxModel, Precision, SampleSet, Weights
from tinycats_core.release import graph_check
from tinycats_core.tensors import write_safetensors

AS_FAST = 1.05  # times the shortest time, within which the smaller file is recommended
RULE = (
    "the fastest whose KID differs from that of fp32 by no more than {tolerance:g} standard errors, in every group; "
    f"of those within {AS_FAST - 1:.0%} of the fastest the smallest"
)


def choose(
    graphs: Sequence[OnnxModel],
    speed: InferenceReport,
    dataset: Dataset,
    settings: SampleConfig,
    judging: EvaluateConfig,
    config: ExportConfig,
    classifier: Weights | None,
    folder: Path,
    evaluations: Path,
    device: str = "auto",
) -> Precision:
    """Compare the graphs by what they draw from the same noise and by their speed, and say which one is recommended.

    A row of the result has, for a graph: `bytes`; `load_ms`, `p50_ms` and `p95_ms` of one image on the CPU of `speed`;
    `max_abs_diff` and `mean_abs_diff` of a pixel from fp32, of 255; by group, the metrics, `kid_delta` from fp32 and the
    `kid_bound` for it; `admissible`, and `chosen`.

    Args:
        graphs: fp32 first.
        evaluations: the folder that `fidelity.evaluate` shares between evaluations.
        device: of the judge.

    Raises:
        ExportError: the chosen graph does not draw the same in a fresh process.
        EvaluationError: the images cannot be judged.
    """
    count = min(judging.samples, config.compared_images)
    labels = labels_to_draw(dataset, count, judging.other_share)
    rows, reference, report = [], None, None
    for one in graphs:
        images = _draw(one, labels, settings)
        samples = _kept(one, images, labels, settings, folder)
        found = evaluate(samples, dataset, judging, classifier, evaluations, device)
        reference, report = (images, found) if reference is None else (reference, report)
        assert report is not None
        rows.append(_row(one, speed, np.abs(images.astype(int) - reference), found, report, judging.tolerance))
    chosen = recommend(rows)
    _require_same_alone(next(one for one in graphs if one.precision == chosen), settings, config.pixel_tolerance)
    facts = {
        "chosen": chosen,
        "rule": RULE.format(tolerance=judging.tolerance),
        "images": count,
        "cpu": speed.facts["machine"]["cpu"],
        "vnni": speed.facts["machine"].get("vnni"),
        "rows": [{**row, "chosen": row["name"] == chosen} for row in rows],
    }
    path = write_json(folder / f"precision-{digest_of([one.sha256 for one in graphs])[:12]}.json", facts)
    return Precision(path=path, sha256=sha256_of(path), chosen=chosen, facts=facts)


def recommend(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the fastest admissible row; of those that are as fast, of the smallest. fp32 is always admissible."""
    admissible = [row for row in rows if row["admissible"]]
    limit = AS_FAST * min(row["p50_ms"] for row in admissible)
    return min((row for row in admissible if row["p50_ms"] <= limit), key=lambda row: row["bytes"])["name"]


def _require_same_alone(one: OnnxModel, settings: SampleConfig, allowed: int) -> None:
    """Raise ExportError if a fresh process draws something else than this one."""
    session = onnx_file.open_session(one.path, onnx_file.GRAPH, threads=torch.get_num_threads())

    def draw(labels: torch.Tensor, batch: int) -> np.ndarray:
        return drawing.draw(session, labels.tolist(), settings.seed, settings.guidance, batch)

    graph_check.require(graph_check.check_alone(one, draw, settings, one.path.name), one.path.name, allowed)


def _draw(one: OnnxModel, labels: torch.Tensor, settings: SampleConfig) -> np.ndarray:
    """Return what a graph draws, uint8 (N, S, S, 3)."""
    session = onnx_file.open_session(one.verify().path, onnx_file.GRAPH, threads=1)
    return drawing.draw(session, labels.tolist(), settings.seed, settings.guidance, workers=drawing.cores())


def _kept(one: OnnxModel, images: np.ndarray, labels: torch.Tensor, settings: SampleConfig, folder: Path) -> SampleSet:
    facts = {**settings.model_dump(mode="json", exclude={"batch_size"}), "model": one.sha256, "runtime": f"onnx-{one.precision}"}
    path = folder / f"samples-{one.sha256[:12]}.safetensors"
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    write_safetensors(path, {"images": pixels, "labels": labels}, {"kind": "samples", "settings": facts})
    return SampleSet(path=path, sha256=sha256_of(path), count=len(labels), settings=facts)


def _row(
    one: OnnxModel,
    speed: InferenceReport,
    difference: np.ndarray,
    found: FidelityReport,
    fp32: FidelityReport,
    tolerance: float,
) -> dict[str, Any]:
    timed = next((row for row in speed.facts["rows"] if row["runtime"] == f"onnx-{one.precision}" and row["device"] == "cpu"), None)
    if timed is None:
        raise ExportError(f"the speed of {one.path.name} was not measured. Measure every graph that is compared.")
    groups = [
        _group(name, mine, reference, found.conditions["extractor"], tolerance)
        for (name, mine), (_, reference) in zip(_figures(found), _figures(fp32), strict=True)
    ]
    return {
        "name": one.precision,
        "what": FORMS[one.precision].what,
        "bytes": one.facts["bytes"],
        "load_ms": timed["load_ms"],
        "p50_ms": timed["latency_ms"]["p50"],
        "p95_ms": timed["latency_ms"]["p95"],
        "max_abs_diff": int(difference.max()),
        "mean_abs_diff": float(difference.mean()),
        "groups": groups,
        "admissible": all(abs(group["kid_delta"]) <= group["kid_bound"] for group in groups),
    }


def _figures(report: FidelityReport) -> list[tuple[str, Mapping[str, float | None]]]:
    own = (str(report.conditions.get("group") or "all"), report.metrics)
    return [own, *((group.name, group.metrics) for group in report.groups)]


def _group(
    name: str, mine: Mapping[str, float | None], fp32: Mapping[str, float | None], extractor: str, tolerance: float
) -> dict[str, Any]:
    kid, frechet = f"kid_{extractor}", f"{'fid' if extractor == 'inception' else 'fd'}_{extractor}"
    kept = {key: mine[key] for key in (kid, frechet, "fid", "breed_accuracy") if key in mine}
    errors = [of.get(f"{kid}_drawn_std") or 0.0 for of in (mine, fp32)]
    return {
        "name": name,
        "metrics": kept,
        "kid_delta": (mine[kid] or 0.0) - (fp32[kid] or 0.0),
        "kid_bound": tolerance * math.hypot(*errors),
    }
