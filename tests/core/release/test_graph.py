"""The graphs from noise to image: their pixels are those of the sampler on the denoiser file, and what is refused."""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tinycats_core.config import CLASSES, ExportConfig, SampleConfig
from tinycats_core.errors import ExportError
from tinycats_core.files import sha256_of
from tinycats_core.generator import drawing, onnx_file, samplers, sampling
from tinycats_core.generator.samplers import SAMPLERS, Evaluation
from tinycats_core.records import OnnxModel
from tinycats_core.release import export, graph, graph_check, stranger

ALL = torch.arange(len(CLASSES))


def opened(model: OnnxModel, settings: SampleConfig) -> onnxruntime.InferenceSession:
    """Compose the graph of a denoiser file, and open it from memory."""
    content = graph.compose(model, settings).SerializeToString()
    return onnx_file.open_session(model.path, onnx_file.GRAPH, threads=1, content=content)


def difference(model: OnnxModel, settings: SampleConfig, session: onnxruntime.InferenceSession | None = None) -> int:
    """Return the largest difference of a pixel from what the sampler draws, over an image of each class."""
    wanted = sampling.sample(onnx_file.onnx_velocity(model.path), ALL, 16, len(CLASSES), settings)
    session = session or opened(model, settings)
    found = drawing.draw(session, ALL.tolist(), settings.seed, settings.guidance, settings.batch_size)
    assert wanted.float().std() > 10
    return int(np.abs(found.astype(int) - wanted.permute(0, 2, 3, 1).numpy()).max())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_pixel_is_that_of_the_sampler(sampler: str, precision: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(precision)
    settings = SampleConfig(sampler=sampler, steps=4, shift=0.6)
    session = opened(model, settings)
    for guidance in (1.0, 1.5, 3.0):
        for batch in (1, 5):
            asked = settings.model_copy(update={"guidance": guidance, "batch_size": batch})
            assert difference(model, asked, session) == 0, (guidance, batch)


@pytest.mark.parametrize("interval", [(0.2, 0.7), (0.0, 0.0), (0.9, 1.0)])
def test_guidance_is_applied_in_its_interval_alone(int8: OnnxModel, interval: tuple[float, float]):
    assert difference(int8, SampleConfig(steps=5, guidance=3, guidance_interval=interval, batch_size=13)) == 0


def backwards(times: Sequence[float]) -> list[Evaluation]:
    """No method of note, but one that looks back two evaluations, at first too far, and does not land at each."""
    grid = itertools.pairwise(times)
    return [row for t, u in grid for row in (Evaluation(t, (u - t) / 2, lands=False), Evaluation(t, u - t, (0.3, -0.2)))]


def test_a_sampler_that_is_added_by_one_row_is_in_the_graph(fp32: OnnxModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAMPLERS, "backwards", backwards)
    assert difference(fp32, SampleConfig(sampler="backwards", steps=3, guidance=2, batch_size=5)) == 0


def counting_denoiser(folder: Path) -> OnnxModel:
    """Return a denoiser whose velocity, everywhere, is how many images it is given at a time, by 100."""
    pixels = ["batch", 3, 4, 4]
    nodes = [
        helper.make_node("Shape", ["labels"], ["rows"], "rows"),
        helper.make_node("Cast", ["rows"], ["count"], "count", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["count", "hundredth"], ["value"], "value"),
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Expand", ["value", "shape"], ["velocity"], "velocity"),
    ]
    typed = helper.make_tensor_value_info
    inputs = [typed("x", TensorProto.FLOAT, pixels), typed("t", TensorProto.FLOAT, ["batch"])]
    inputs += [typed("labels", TensorProto.INT64, ["batch"])]
    constants = [numpy_helper.from_array(np.array(0.01, np.float32), "hundredth")]
    made = helper.make_graph(nodes, "counting", inputs, [typed("velocity", TensorProto.FLOAT, pixels)], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    facts = {"image_size": "4", "classes": '["a", "b"]', "null_class": "2", "source_sha256": "0" * 64}
    helper.set_model_props(model, {"format": onnx_file.DENOISER, **facts})
    return export.write(model, folder / "denoiser-fp32.onnx", "fp32")


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 4), (1.5, 7), (0.0, 7)])
def test_guidance_costs_a_second_pass_only_while_it_is_applied(guidance: float, passes: int, tmp_path: Path):
    settings = SampleConfig(sampler="euler", steps=4, shift=1, guidance_interval=(0.2, 1))  # at three of the four times
    session = opened(counting_denoiser(tmp_path), settings)
    noise, labels = np.full((3, 3, 4, 4), -1, np.float32), np.array([0, 1, 0])
    feeds = {"noise": noise, "labels": labels, "guidance": np.array(guidance, np.float32)}
    images = np.asarray(session.run(["images"], feeds)[0])
    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == [round(3 * passes / 100 / 4 * 127.5)]


def test_a_graph_says_what_it_is(fp32: OnnxModel, tmp_path: Path):
    settings = SampleConfig(steps=3, guidance=1.5, seed=4)
    made = export.write(graph.compose(fp32, settings), tmp_path / "cats-fp32.onnx", "fp32")
    again = export.write(graph.compose(fp32, settings), tmp_path / "again.onnx", "fp32")
    assert made.sha256 == again.sha256
    facts, of_denoiser = (onnx_file.require_self_contained(path) for path in (made.path, fp32.path))
    assert {name: facts[name] for name in graph.KEPT} == {name: of_denoiser[name] for name in graph.KEPT}
    assert facts["denoiser_sha256"] == fp32.sha256
    assert SampleConfig.model_validate_json(facts["sampling"]) == settings
    session = onnxruntime.InferenceSession(made.path)
    assert [(item.name, item.type, item.shape) for item in (*session.get_inputs(), *session.get_outputs())] == [
        ("noise", "tensor(float)", ["batch", 3, 16, 16]),
        ("labels", "tensor(int64)", ["batch"]),
        ("guidance", "tensor(float)", []),
        ("images", "tensor(uint8)", ["batch", 3, 16, 16]),
    ]
    longer = graph.compose(fp32, settings.model_copy(update={"steps": 50})).ByteSize()
    assert longer < made.path.stat().st_size + 2000  # no step is written out


def damaged(path: Path, content: bytes) -> OnnxModel:
    path.write_bytes(content)
    return OnnxModel(path=path, sha256=sha256_of(path), precision="fp32")


def test_what_is_no_denoiser_is_refused_before_a_file_is_written(fp32: OnnxModel, classifier_onnx: OnnxModel, tmp_path: Path):
    whole, settings, out = fp32.path.read_bytes(), SampleConfig(steps=3), tmp_path / "out"
    for model, why in (
        (fp32.model_copy(update={"path": tmp_path / "absent.onnx"}), r"absent.onnx does not exist. Export the model again"),
        (damaged(tmp_path / "random.onnx", np.random.default_rng(0).bytes(9000)), "random.onnx is not a complete ONNX file"),
        (damaged(tmp_path / "short.onnx", whole[: len(whole) // 2]), "short.onnx is not a complete ONNX file"),
        (classifier_onnx, "classifier.onnx is not a denoiser of this project: its metadata has no format tinycats-denoiser/1"),
    ):
        with pytest.raises(ExportError, match=why):
            graph_check.export_graph(model, settings, ExportConfig(), out)
    assert not out.exists() or list(out.iterdir()) == []


def test_a_graph_that_draws_something_else_is_refused_and_not_left(
    fp32: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = graph.compose
    monkeypatch.setattr(graph, "compose", lambda model, settings: right(model, settings.model_copy(update={"shift": 0.7})))
    asked = (fp32, SampleConfig(steps=3), ExportConfig(), tmp_path)
    with pytest.raises(
        ExportError, match=r"cats-fp32.onnx does not draw .* max_abs_diff is \d+ of 255, allowed is 0 \(export.pixel_"
    ):
        graph_check.export_graph(*asked)
    assert list(tmp_path.iterdir()) == []


def test_what_a_graph_is_given_is_held_to_its_shapes(fp32: OnnxModel):
    session = opened(fp32, SampleConfig(steps=3))
    good: dict[str, Any] = {
        "noise": drawing.noise([0, 1], 16, 1),
        "labels": np.array([0, 1]),
        "guidance": np.array(1.5, np.float32),
    }
    assert np.asarray(session.run(["images"], good)[0]).shape == (2, 3, 16, 16)
    for name, value, why in (
        ("noise", drawing.noise([0, 1], 8, 1), "Got invalid dimensions for input: noise"),
        ("noise", good["noise"].astype(np.float64), "Unexpected input data type"),
        ("noise", drawing.noise([0, 1, 2], 16, 1), "Cannot split"),
        ("labels", np.array([0]), "Cannot split"),
        ("labels", np.array([0, 14]), "out of data bounds"),
    ):
        with pytest.raises(Exception, match=why):  # onnxruntime's errors have no common base
            session.run(["images"], good | {name: value})
    for labels, guidance, why in (
        ([0, 13], 1.5, "label 13 is not a class; allowed: 0 to 12"),
        ([-1], 1.5, "label -1 is not a class"),
        ([0], float("nan"), "the guidance is nan; give a number, or 1 for none"),
        ([0], float("inf"), "the guidance is inf"),
    ):
        with pytest.raises(ValueError, match=why):
            drawing.draw(session, labels, 1, guidance, 4)


def test_an_opset_that_onnxruntime_does_not_know_is_named(fp32: OnnxModel, tmp_path: Path):
    made = graph.compose(fp32, SampleConfig(steps=3))
    made.opset_import[0].version = 99
    (tmp_path / "cats-fp32.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ExportError, match=r"cats-fp32.onnx is not a complete ONNX file .*99.*install a newer one"):
        onnx_file.open_session(tmp_path / "cats-fp32.onnx", onnx_file.GRAPH)


def test_a_plan_without_a_sampler_is_refused(fp32: OnnxModel):
    with pytest.raises(samplers.ConfigError, match="sample.sampler is 'dpm'"):
        graph.compose(fp32, SampleConfig(sampler="dpm"))


def test_what_a_stranger_found_is_in_the_record(parts: dict[str, Any]):
    for made in parts["graphs"]:
        facts = made.facts
        assert [facts[name] for name in ("max_abs_diff", "alone_max_abs_diff", "script_max_abs_diff", "tolerance")] == [0] * 4
        assert facts["images"] >= len(CLASSES)
        assert (facts["alone_numpy"], facts["alone_onnxruntime"]) == (np.__version__, onnxruntime.__version__)
        assert facts["bytes"] == made.path.stat().st_size


def drawn(labels: torch.Tensor, batch: int) -> np.ndarray:
    return np.zeros((len(labels), 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
        ("import tinycats_core", "ModuleNotFoundError: No module named 'tinycats_core'"),
        ("raise SystemExit('this file is broken')", "this file is broken"),
    ],
)
def test_a_stranger_has_nothing_but_numpy_and_onnxruntime(
    parts: dict[str, Any], script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sample.py").write_text(script)
    monkeypatch.setattr(drawing, "__file__", str(tmp_path / "sample.py"))
    made = parts["graphs"][0]
    with pytest.raises(ExportError, match=rf"cats-fp32.onnx cannot be drawn with by NumPy and onnxruntime alone: .*{said}"):
        graph_check.check_alone(made, drawn, parts["choice"].sample, "cats-fp32.onnx")


def test_a_stranger_who_does_not_end_is_given_up(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph_check, "SECONDS", 0.01)
    with pytest.raises(ExportError, match=r"cats-fp32.onnx drew nothing in 0.01 s .*idle machine"):
        graph_check.check_alone(parts["graphs"][0], drawn, parts["choice"].sample, "cats-fp32.onnx")


def test_stored_pixels_are_compared(parts: dict[str, Any], tmp_path: Path):
    (tmp_path / "nothing.py").write_text("")
    facts = {"labels": np.arange(2), "guidance": np.array(1.5, np.float32), "images": np.zeros((2, 3, 16, 16), np.uint8)}
    np.savez(tmp_path / "case.npz", noise=drawing.noise([0, 1], 16, 1), **facts)
    command = [sys.executable, "-I", stranger.__file__, "case.npz", str(parts["graphs"][0].path), "nothing.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["max_abs_diff"] > 100


def test_a_graph_is_one_file(parts: dict[str, Any]):
    for made in parts["graphs"]:
        onnx.checker.check_model(made.path, full_check=True)
        text = made.path.read_bytes()
        assert b"site-packages" not in text
        assert str(Path(export.__file__).parents[2]).encode() not in text


def test_an_int8_image_depends_on_no_other(parts: dict[str, Any]):
    settings = parts["choice"].sample
    for made, model in zip(parts["graphs"], parts["models"], strict=True):
        session = onnx_file.open_session(made.path, onnx_file.GRAPH, threads=1)
        alone = drawing.draw(session, ALL.tolist(), settings.seed, 3.0)
        together = drawing.draw(session, ALL.tolist(), settings.seed, 3.0, 13)
        assert int(np.abs(alone.astype(int) - together).max()) <= (0 if model.precision == "int8" else 1)
        assert np.array_equal(drawing.draw(session, ALL.tolist(), settings.seed, 3.0, workers=3), alone)
