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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few repeats as are allowed, once, however busy the machine is."""
    few = "inference.MOST, inference.THROUGHPUT_SECONDS = inference.LEAST, 0.0; "
    monkeypatch.setattr(inference, "CHILD", inference.CHILD.replace("inference.answer()", f"{few}inference.answer()"))
    monkeypatch.setattr(inference, "SPREAD", math.inf)
    monkeypatch.setattr(inference, "BUSY", math.inf)


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
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


def figures(seconds: list[float], load: float | None) -> dict[str, Any]:
    rounds = [{"seconds": {str(batch): seconds for batch in inference.BATCHES}, "load": load}]
    return inference._figures(rounds * inference.ROUNDS)


CALM, BURST = [0.04] * 5, [0.04, 0.04, 6.17, 6.17, 6.17]


@pytest.mark.parametrize(
    ("first", "second", "kept", "noted"),
    [
        ((BURST, 0.0), (CALM, 0.1), 40.0, False),
        ((CALM, 1.9), ([0.09] * 5, 1.0), 40.0, True),
        ((BURST, 0.0), (BURST, 0.0), 6170.0, True),
        (([0.05] * 5, 0.0), (CALM, None), 40.0, False),
    ],
    ids=["a burst", "busy twice", "a burst twice", "calm"],
)
def test_of_two_measurements_the_steadier_one_is_kept(
    first: tuple[list[float], float | None], second: tuple[list[float], float | None], kept: float, noted: bool
):
    found = inference._steadier(figures(*first), figures(*second))
    assert found["latency_ms"]["p50"] == pytest.approx(kept)
    notes = [
        note for note in inference._notes([found | {"runtime": "pytorch", "device": "cpu"}]) if "beside other programs" in note
    ]
    assert bool(notes) == noted


def test_runtimes_draw_in_turns_and_again_if_one_is_unsteady(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, Any]] = []

    class Process:
        def __init__(self, request: dict[str, Any]):
            self.name = request["runtime"]

        def __enter__(self) -> "Process":
            return self

        def __exit__(self, *error: object) -> None: ...

        def tell(self, *request: Any) -> None: ...

        def hear(self) -> bool:
            return True

        def ask(self, method: str, argument: Any = None) -> Any:
            if method == "round":
                asked.append((self.name, argument))
                burst = self.name == "onnx-fp32" and argument < inference.ROUNDS
                return {"seconds": {str(batch): BURST if burst else CALM for batch in inference.BATCHES}, "load": 0.0}
            return {"runtime": self.name, "load_ms": 1.0} if method == "load" else 2**20

    monkeypatch.setattr(inference, "_Process", Process)
    rows = inference._measure_in_turns([{"runtime": "pytorch"}, {"runtime": "onnx-fp32"}])
    assert asked == [(name, number) for number in range(2 * inference.ROUNDS) for name in ("pytorch", "onnx-fp32")]
    assert [row["latency_ms"]["p50"] for row in rows] == pytest.approx([40, 40])
    assert [row["peak_memory_mb"] for row in rows] == [1, 1]
