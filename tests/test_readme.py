"""The README says what is: its numbers come from files, its presets from the configuration, its links lead somewhere."""

import csv
import json
import re
from pathlib import Path

import pytest

from tinycats_core.presets import PRESETS, resolve
from tinycats_core.release import inference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_metrics_are_those_of_the_release_whose_grid_is_shown():
    block = README.split("<!-- metrics:begin -->")[1].split("<!-- metrics:end -->")[0]
    with open(ROOT / "docs" / "smoke" / "metrics.csv", newline="") as file:
        measured = {row["metric"]: row for row in csv.DictReader(file)}
    shown = [row for row in rows(block) if row[0].startswith("`")]
    assert len(shown) >= 4
    for name, candidate, int8, floor, *_ in shown:
        found = measured[name.strip("`")]
        for text, column in ((candidate, "candidate"), (int8, "onnx-int8"), (floor, "floor")):
            assert float(text) == pytest.approx(float(found[column]), abs=0.5 * 10 ** -len(text.partition(".")[2])), name


def test_how_fast_an_image_is_drawn_is_what_that_release_measured():
    found = json.loads((ROOT / "docs" / "smoke" / "benchmark.json").read_text())["inference"]
    said = re.search(r"([\d.]+) ms in PyTorch, ([\d.]+) ms with the fp32 file and ([\d.]+) ms with the\sint8 file", README)
    assert said
    assert list(said.groups()) == [f"{row['latency_ms']['p50']:.1f}" for row in found["rows"]]
    assert f"in {found['sample']['steps']} guided steps" in README
    assert found["sample"]["guidance"] > 1
    assert found["machine"]["cpu"] in README
    assert {row["repeats"] <= inference.MOST for row in found["rows"]} == {True}  # measured as it is now


def test_how_often_the_gate_errs_is_what_its_benchmark_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "judge.json").read_text())
    said = " ".join(README.split()).replace(" %", "%")
    assert f"of {found['resamples']} releases of the same model it refused {found['false_rejections']:.1%}" in said
    assert f"it let {found['missed_worse']:.1%} pass" in said
    assert f"{found['canaries_refused']} of {found['canaries']} canaries" in said
    assert found["worse_steps"] * 8 == found["steps"]
    cost = json.loads((ROOT / "benchmarks" / "results" / "judge-photos.json").read_text())
    assert f"take {cost['cost_ratio']:.2f} times as long" in said
    assert f"looks {cost['extract_speedup']:.1f} times as fast" in said
    assert f"metrics come to {found['cost_ratio']:.2f} times looking" in said


def test_what_modal_does_not_break_is_what_its_benchmark_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "modal_faults.json").read_text())
    assert (found["preemptions"], found["calls_made"], found["bit_identical"]) == (10, 1, True)
    said = f"the same bits and {found['steps_run']} steps run for {found['steps']}; a cancelled call was gone after"
    assert f"{said} {found['cancel_seconds']:.2f} s" in " ".join(README.split())


def test_what_the_classifier_gets_right_is_what_its_benchmark_measured():
    block = README.split("<!-- classifier:begin -->")[1].split("<!-- classifier:end -->")[0]
    found = json.loads((ROOT / "benchmarks" / "results" / "classifier.json").read_text())
    images = found["runs"][0]["images"]
    assert f"on {images['train']} of them" in block
    assert f"of {images['test']} unseen ones" in block
    assert {run["settings"]["image_size"] for run in found["runs"]} == {32}
    names = ("toy_accuracy", "breed_accuracy", "breed_interval", "breed_majority", "cat_accuracy", "cat_interval", "cat_majority")
    names += ("breed_accuracy_balance_1", "macro_recall_balance_1", "macro_recall_balance_0", "macro_recall_chance")
    values = [value for name in names for value in (found[name] if isinstance(found[name], list) else [found[name]])]
    assert re.findall(r"\d+\.\d(?=[ –])", block) == [f"{value:.1%}".rstrip("%") for value in values]
    assert found["balance"] == 0


def test_the_deployments_are_the_presets():
    shown = {row[0].removeprefix("`release-model/").strip("`"): row for row in rows(README) if "release-model/" in row[0]}
    assert shown.keys() == PRESETS.keys()
    for name, row in shown.items():
        config = resolve(name)
        assert int(row[1].replace(",", "")) == config.train.steps
        assert float(row[2]) == config.train.lr
        assert row[3] == f"{config.model.image_size} px"


def test_links_and_make_targets_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\bmake ([a-z]+)", README):
        assert re.search(rf"^{name}:", makefile, re.M), name
