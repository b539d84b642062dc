"""The forms of the graph: they draw the same cats, and the one that is recommended follows from the table."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from release_parts import TINY

from tinycats_core.config import CLASSES, ExportConfig
from tinycats_core.config.forms import ALWAYS, FORMS, OTHERS
from tinycats_core.errors import ConfigError, ExportError
from tinycats_core.files import read_json
from tinycats_core.generator import drawing, onnx_file
from tinycats_core.generator.samplers import plan_of
from tinycats_core.presets import load
from tinycats_core.records import InferenceReport, OnnxModel, Precision, Weights
from tinycats_core.release import forms, precision, tables

CLOSE = {"fp16": 2, "fp32-opset23": 1, "int8-opset23": 40, "int8-table": 40}  # of 255, for a network of random weights


def row(name: str, p50: float, size: int, admissible: bool = True) -> dict[str, Any]:
    return {"name": name, "p50_ms": p50, "bytes": size, "admissible": admissible}


@pytest.fixture(scope="module")
def made(checkpoint: Weights, fp32: OnnxModel, parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    return forms.make(checkpoint, fp32, parts["choice"].sample, ExportConfig(), tmp_path_factory.mktemp("forms"))


def pixels(model: OnnxModel, settings: Any) -> np.ndarray:
    session = onnx_file.open_session(model.path, onnx_file.GRAPH, threads=1)
    return drawing.draw(session, list(range(len(CLASSES))), settings.seed, settings.guidance).astype(int)


def test_every_form_draws_nearly_the_images_of_fp32(made: tuple[OnnxModel, ...], parts: dict[str, Any]):
    settings = parts["choice"].sample
    reference, size = pixels(parts["graphs"][0], settings), parts["graphs"][0].path.stat().st_size
    assert reference.std() > 10
    assert [one.precision for one in made] == list(OTHERS)
    for one in made:
        difference = np.abs(pixels(one, settings) - reference)
        assert difference.max() <= CLOSE[one.precision], one.precision
        assert one.path.name == f"cats-{one.precision}.onnx"
        opset = FORMS[one.precision].opset or ExportConfig().opset
        assert one.facts["opset"] == opset
        assert (one.path.stat().st_size < 0.75 * size) == (FORMS[one.precision].weights != "fp32")


def test_a_table_holds_what_its_layers_compute(fp32: OnnxModel, parts: dict[str, Any]):
    """The network with tables is the network: the same velocity, without the layers of time and class."""
    whole = onnx.load(fp32.path)
    times, classes = [evaluation.t for evaluation in plan_of(parts["choice"].sample)], len(CLASSES) + 1
    core, found = tables.tabulate(whole, times, classes)
    assert core.ByteSize() < whole.ByteSize()
    assert all(len(table) == len(times) * classes for table in found.values())
    onnx.checker.check_model(core, full_check=True)
    rng, number, label = np.random.default_rng(0), 1, 5
    feeds = {"x": rng.standard_normal((1, 3, 16, 16), np.float32), "t": np.array([times[number]], np.float32)}
    feeds["labels"] = np.array([label])
    looked_up = {name: table[[number * classes + label]] for name, table in found.items()}
    wanted: Any = onnxruntime.InferenceSession(fp32.path).run(["velocity"], feeds)[0]
    session = onnxruntime.InferenceSession(core.SerializeToString())
    known = {given.name for given in session.get_inputs()}
    got: Any = session.run(["velocity"], {name: value for name, value in (feeds | looked_up).items() if name in known})[0]
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_table_larger_than_its_layers_is_left_out(checkpoint: Weights, fp32: OnnxModel, parts: dict[str, Any], tmp_path: Path):
    settings = parts["choice"].sample.model_copy(update={"steps": 1000})
    assert forms.make(checkpoint, fp32, settings, ExportConfig(forms=("int8-table",)), tmp_path) == ()


def test_without_int8_no_form_of_it_is_made(checkpoint: Weights, fp32: OnnxModel, parts: dict[str, Any], tmp_path: Path):
    config = ExportConfig(int8=False, forms=("fp16", "int8-opset23"))
    assert [one.precision for one in forms.make(checkpoint, fp32, parts["choice"].sample, config, tmp_path)] == ["fp16"]


def test_an_unknown_form_is_named():
    with pytest.raises(ConfigError, match=r"export.forms.*'int4' is not a further form; allowed: fp16, fp32-opset23"):
        load(TINY | {"export": {"forms": ["int4"]}})


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("fp32", 20, 100), row("int8", 10, 30), row("fp16", 20, 50)], "int8"),
        ([row("fp32", 20, 100), row("int8", 10, 30, admissible=False), row("fp16", 20.9, 50)], "fp16"),
        ([row("fp32", 20, 100), row("int8", 10, 30), row("int8-table", 9.6, 31), row("int8-opset23", 9, 32)], "int8-opset23"),
        ([row("fp32", 20, 100), row("int8", 10, 30), row("int8-table", 9.6, 31)], "int8"),
        ([row("fp32", 20, 100)], "fp32"),
    ],
    ids=["the fastest", "not one that draws worse", "clearly faster", "as fast, smaller", "alone"],
)
def test_the_fastest_that_draws_as_well_is_recommended(rows: list[dict[str, Any]], chosen: str):
    assert precision.recommend(rows) == chosen


def test_graphs_are_compared_by_what_they_draw(parts: dict[str, Any], classifier: Weights, tmp_path: Path):
    config = load(TINY | {"evaluate": {"extractor": "breed", "samples": 52, "kid_subsets": 4}})

    def choose(speed: InferenceReport) -> Precision:
        return precision.choose(
            parts["graphs"],
            speed,
            parts["dataset"],
            parts["choice"].sample,
            config.evaluate,
            config.export,
            classifier,
            tmp_path,
            tmp_path / "evaluations",
            "cpu",
        )

    found = choose(parts["inference"])
    assert read_json(found.verify().path) == found.facts
    fp32, int8 = found.facts["rows"]
    assert (fp32["max_abs_diff"], fp32["mean_abs_diff"], fp32["admissible"]) == (0, 0.0, True)
    assert 0 < int8["mean_abs_diff"] < int8["max_abs_diff"] < 100
    assert (int8["p50_ms"], int8["bytes"]) == (7.5, parts["graphs"][1].path.stat().st_size)
    assert [group["name"] for group in int8["groups"]] == ["all"]
    assert [row["name"] for row in (fp32, int8) if row["chosen"]] == [found.chosen]
    for group, reference in zip(int8["groups"], fp32["groups"], strict=True):
        assert group["kid_delta"] == group["metrics"]["kid_breed"] - reference["metrics"]["kid_breed"]
        assert group["kid_bound"] > 0
    assert [one.precision for one in forms.shipped(parts["graphs"], found.chosen)] == list(ALWAYS)
    unmeasured = InferenceReport(path=found.path, sha256=found.sha256, facts={**parts["inference"].facts, "rows": []})
    with pytest.raises(ExportError, match="the speed of cats-fp32.onnx was not measured"):
        choose(unmeasured)
