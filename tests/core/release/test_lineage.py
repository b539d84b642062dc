"""The lineage of a release: unbroken as it was made, and broken by name wherever somebody has changed a link and sealed again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinycats_core.files import digest_of, read_json, sha256_of, write_json
from tinycats_core.records import OnnxModel, Release, ReleaseParts, Weights
from tinycats_core.release import bundle, lineage, manifest


def resealed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda sealed: None) -> list[str]:
    """Seal a changed release as a careful forger would, and return what is wrong with it."""
    sealed = read_json(folder / "release.json")
    for file in sealed["files"]:
        sealed["files"][file] = {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size}
    change(sealed)
    manifest.write_sealed(folder, sealed | {"lineage": manifest.lineage(sealed)})
    return lineage.inspect(folder)["wrong"]


def edited(path: Path, change: Callable[[Any], object]) -> None:
    value = read_json(path)
    change(value)
    write_json(path, value)


def test_a_release_names_what_it_comes_from_each_with_its_digest(built: Release, parts: dict[str, Any]):
    sealed = read_json(built.path)
    chain = sealed["lineage"]
    assert list(chain) == [
        *("data", "configuration", "code", "environment", "parent", "weights", "choice", "samples", "metrics"),
        *("denoiser-fp32", "denoiser-int8", "cats-fp32", "cats-int8", "decision"),
    ]
    for name, link in chain.items():
        assert link["sha256"] == (sealed["files"][link["file"]]["sha256"] if link["file"] else digest_of(sealed[name]))
    assert {"python", "torch", "onnxruntime", "onnx", "tinycats"} <= sealed["environment"].keys()
    assert sealed["parent"] == {"version": parts["decision"].baseline, "sha256": parts["parent"].sha256}
    assert sealed["format"] == "tinycats-release/2"


def test_every_link_of_a_release_holds(
    parts: dict[str, Any], classifier: Weights, classifier_onnx: OnnxModel, built: Release, tmp_path: Path
):
    result = lineage.inspect(built.folder)
    assert result["wrong"] == []
    assert {check["link"] for check in result["lineage"]} == set(lineage.LINKS) - {"code"} | {"code"}
    assert len(result["lineage"]) > 25
    reports = {name: parts[name] for name in ("report", "baseline")} | {"int8": parts["onnx_reports"][0]}
    seen = {
        name: report.model_copy(update={"conditions": {**report.conditions, "classifier_sha256": classifier.sha256}})
        for name, report in reports.items()
    }
    judged = {
        "report": seen["report"],
        "onnx_reports": (seen["int8"],),
        "classifier": classifier,
        "classifier_onnx": classifier_onnx,
    }
    assert lineage.inspect(bundle.build(tmp_path, ReleaseParts(**parts | judged)).folder)["wrong"] == []


@pytest.mark.parametrize(
    ("file", "change", "link"),
    [
        ("data.json", lambda value: value.update(train_count=7), "data: content of dataset"),
        ("data.json", lambda value: value.update(sha256="1" * 64), "data: sha256 in data.json"),
        ("release_config.json", lambda value: value["train"].update(steps=5), "configuration: key"),
        ("sweep.json", lambda value: value["sample"].update(guidance=9.0), "choice: sweep.json"),
        ("decision.json", lambda value: value["terms"][0].update(passed=False), "decision: content of decision"),
        ("decision.json", lambda value: value.update(baseline="other"), "parent: version in decision.json"),
        ("metrics.json", lambda value: value["candidate"]["metrics"].update(recall=0.99), "metrics: content of report"),
        (
            "metrics.json",
            lambda value: value["onnx"]["onnx-int8"]["floor"].update(recall=0.99),
            "metrics: content of report-onnx-int8",
        ),
        ("metrics.json", lambda value: value["baseline"]["metrics"].update(recall=0.99), "parent: content of baseline"),
        ("benchmark.json", lambda value: value["onnx"]["int8"].update(relative_error=0.0), "onnx: content of denoiser-int8"),
        ("samples/metadata.json", lambda value: value.update(count=1_000), "samples: content of samples"),
        (
            "samples/metadata.json",
            lambda value: value["settings"].update(model="1" * 64),
            "samples: weights in samples/metadata.json",
        ),
    ],
)
def test_a_changed_fact_breaks_its_link_although_the_release_is_sealed_again(
    release: Path, file: str, change: Callable[[Any], object], link: str
):
    edited(release / file, change)
    (wrong,) = resealed(release)
    assert wrong.startswith(f"the lineage breaks at {link}")


def test_other_weights_break_the_lineage(release: Path, parts: dict[str, Any]):
    shutil.copyfile(release / "denoiser-fp32.onnx", release / "denoiser-int8.onnx")
    (wrong,) = resealed(release)
    assert wrong.startswith("the lineage breaks at metrics: weights of report-onnx-int8 is ")
    assert "expected was" in wrong


@pytest.mark.parametrize(
    ("change", "link"),
    [
        (lambda sealed: sealed.update(version="0123456789ab"), "version: version"),
        (lambda sealed: sealed["parents"]["checkpoint"].update(sha256="1" * 64), "weights: model.safetensors"),
        (lambda sealed: sealed.update(parent=None), "parent: version in decision.json"),
    ],
)
def test_a_changed_manifest_breaks_its_link(release: Path, change: Callable[[Any], object], link: str):
    (wrong,) = resealed(release, change)
    assert wrong.startswith(f"the lineage breaks at {link}")


def test_an_environment_that_is_not_the_one_of_the_lineage_is_found(release: Path):
    sealed = read_json(release / "release.json")
    manifest.write_sealed(release, sealed | {"environment": {"python": "2.7"}})
    (wrong,) = lineage.inspect(release)["wrong"]
    assert wrong.startswith("the lineage breaks at environment")


def test_a_release_of_the_first_format_is_still_read(release: Path):
    sealed = read_json(release / "release.json")
    for name in ("environment", "parent", "lineage", "code"):
        del sealed[name]
    version = digest_of({"key": sealed["key"], "parents": sealed["parents"]})[:12]
    manifest.write_sealed(release, sealed | {"format": "tinycats-release/1", "version": version})
    result = lineage.inspect(release)
    assert (result["wrong"], result["format"]) == ([], "tinycats-release/1")
    assert json.dumps(result)
