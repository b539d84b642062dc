"""The inference benchmark: what it counts is what was done, and each runtime is measured in a process of its own."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinycats_core.errors import CheckpointError, ExportError, TinycatsError
from tinycats_core.files import read_json
from tinycats_core.records import OnnxModel, Release, Weights
from tinycats_core.release import inference


def test_percentiles_are_those_of_the_times_and_rise():
    seconds = np.random.default_rng(0).permutation(np.linspace(0.001, 0.101, 101)).tolist()
    found = inference.percentiles(seconds)
    assert found == pytest.approx({"p50": 51, "p95": 96, "p99": 100})
    scattered = inference.percentiles(np.random.default_rng(1).lognormal(size=150).tolist())
    values = [value for value in scattered.values() if value is not None]
    assert len(values) == 3
    assert values == sorted(set(values))


@pytest.mark.parametrize(
    ("count", "given"), [(19, ["p50"]), (20, ["p50", "p95"]), (99, ["p50", "p95"]), (100, ["p50", "p95", "p99"])]
)
def test_a_percentile_that_too_few_times_cannot_tell_is_none(count: int, given: list[str]):
    found = inference.percentiles([0.5] * count)
    assert found == {name: 500 if name in given else None for name in ("p50", "p95", "p99")}


def test_calls_are_repeated_until_the_time_is_up_but_often_enough_and_not_too_often(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: now))
    assert inference.repeat(call, warm_up=2, least=5, most=50, budget=0.0) == [0.25] * 5
    assert now == 7 * 0.25
    assert inference.repeat(call, warm_up=0, least=1, most=4, budget=100.0) == [0.25] * 4
    assert inference.repeat(call, warm_up=0, least=1, most=50, budget=1.1) == [0.25] * 5


def test_every_runtime_of_a_release_is_measured(built: Release, parts: dict[str, Any]):
    found = inference.measure_release(built.folder, "cpu")
    rows = {row["runtime"]: row for row in found["rows"]}
    assert list(rows) == ["pytorch", "onnx-fp32", "onnx-int8"]
    for row in rows.values():
        latency, speed = row["latency_ms"], row["images_per_s"]
        assert row["device"] == "cpu"
        assert inference.LEAST <= row["repeats"] <= inference.MOST
        assert 0 < latency["p50"] <= latency["p95"]
        assert (latency["p99"] is None) == (row["repeats"] < 100)
        assert list(speed) == ["1", "4", "8", "16"]
        assert 1000 / latency["p50"] / 10 < speed["1"] < 10_000 / latency["p50"]  # the mean is of the same times
        assert 0 < row["load_ms"] < 60_000
        assert 0 < row["peak_memory_mb"] < 1000  # far less than the libraries, which are not counted
    short = [row for row in rows.values() if row["latency_ms"]["p99"] is None]
    unsteady = [row for row in rows.values() if row["spread"] > inference.SPREAD or (row["load"] or 0) > inference.BUSY]
    assert len(found["notes"]) == len(short) + len(unsteady)
    medians = {name: row["latency_ms"]["p50"] for name, row in rows.items()}
    assert found["ratios"]["fp32_over_int8"] == medians["onnx-fp32"] / medians["onnx-int8"]
    assert found["ratios"]["pytorch_over_fp32"] == medians["pytorch"] / medians["onnx-fp32"]
    chosen = parts["choice"].sample.model_dump(mode="json")
    assert found["sample"] == {name: value for name, value in chosen.items() if name != "batch_size"}
    assert found["machine"].keys() >= {"cpu", "cores", "torch_threads", "gpu", "python", "torch", "onnxruntime", "tinycats"}


def test_the_figures_are_kept_as_they_were_measured(checkpoint: Weights, parts: dict[str, Any], tmp_path: Path):
    report = inference.benchmark(checkpoint, [], parts["choice"].sample, tmp_path, "cpu").verify()
    assert read_json(report.path) == report.facts
    assert [row["runtime"] for row in report.facts["rows"]] == ["pytorch"]
    assert report.facts["ratios"] == {}
    assert math.isfinite(report.facts["rows"][0]["peak_memory_mb"])


def test_what_cannot_be_measured_is_named(
    checkpoint: Weights, fp32: OnnxModel, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample = parts["choice"].sample
    with pytest.raises(CheckpointError, match=r"absent.safetensors does not exist"):
        inference.measure(tmp_path / "absent.safetensors", {}, sample, "cpu")
    with pytest.raises(TinycatsError, match=r"denoiser-fp32.onnx does not exist"):
        inference.benchmark(checkpoint, [fp32.model_copy(update={"path": tmp_path / "denoiser-fp32.onnx"})], sample, tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.path.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ExportError, match=r"damaged.safetensors is damaged: .* make it again"):  # found by the child
        inference.measure(damaged, {}, sample, "cpu")
    monkeypatch.setattr(inference, "CHILD", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ExportError, match=r"pytorch could not be measured on cpu: its process ended with -9 .*Free memory"):
        inference.measure(checkpoint.path, {}, sample, "cpu")


@pytest.mark.parametrize(
    ("first", "second", "asked", "kept"),
    [
        ((1.1, 0.0, 40.0), (1.0, 0.0, 30.0), 1, 40.0),
        ((9.0, 0.0, 6170.0), (1.1, 0.1, 40.0), 2, 40.0),
        ((1.1, 1.9, 80.0), (3.0, 1.0, 90.0), 2, 80.0),
        ((1.1, None, 40.0), (1.0, None, 30.0), 1, 40.0),
    ],
    ids=["calm", "a burst", "busy twice", "no load known"],
)
def test_an_unsteady_measurement_is_repeated_once(
    first: tuple[Any, ...], second: tuple[Any, ...], asked: int, kept: float, monkeypatch: pytest.MonkeyPatch
):
    rows = [
        {"runtime": "pytorch", "device": "cpu", "spread": spread, "load": load, "latency_ms": {"p50": p50}}
        for spread, load, p50 in (first, second)
    ]
    left = iter(rows)
    monkeypatch.setattr(inference, "_ask", lambda request: next(left))
    row = inference._settled({})
    assert row["latency_ms"]["p50"] == kept
    assert len(list(left)) == 2 - asked
    assert len(inference._notes([row])) == (kept == 80.0)
