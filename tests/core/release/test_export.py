import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from release_parts import make_checkpoint

from tinycats_core.config import CLASSES, ExportConfig, SampleConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import CheckpointError, ExportError
from tinycats_core.evaluation.classifier import load_classifier, predict
from tinycats_core.files import sha256_of
from tinycats_core.generator import onnx_file, sampling
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Dataset, OnnxModel, Weights
from tinycats_core.release import export, graph, graph_check


def measure(checkpoint: Weights, model: OnnxModel, config: ExportConfig, folder: Path) -> dict[str, Any]:
    return dict(export.check(checkpoint, model, config, folder).facts)


def metadata(model: OnnxModel) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}


@pytest.mark.parametrize("batch", [1, 3, 28])
def test_fp32_gives_what_the_network_gives_at_any_batch_size(checkpoint: Weights, fp32: OnnxModel, batch: int):
    network, _ = load_generator(checkpoint.path)
    labels = torch.arange(batch) % 14
    x, t = sampling.initial_noise(range(batch), 16, seed=3), torch.linspace(0, 1, batch)
    with torch.inference_mode():
        wanted = network(x, t, labels)
    found = onnx_file.onnx_velocity(fp32.path)(x, t, labels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_file_is_one_valid_file_that_says_what_it_is_and_not_where_it_was_made(
    checkpoint: Weights, fp32: OnnxModel, int8: OnnxModel
):
    for model in (fp32, int8):
        onnx.checker.check_model(model.path, full_check=True)
        assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]
        text = model.path.read_bytes()
        assert b"site-packages" not in text
        assert os.fsencode(Path(export.__file__).parents[1]) not in text
        facts = metadata(model)
        assert facts["image_size"] == "16"
        assert facts["null_class"] == "13"
        assert facts["prediction"] == "x"
        assert facts["source_sha256"] == checkpoint.sha256
        assert '"Abyssinian"' in facts["classes"]
        assert "t=0 noise" in facts["convention"]
    session = onnxruntime.InferenceSession(fp32.path)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("x", "tensor(float)", ["batch", 3, 16, 16]),
        ("t", "tensor(float)", ["batch"]),
        ("labels", "tensor(int64)", ["batch"]),
    ]
    assert fp32.facts["opset"] == 20


def test_exporting_twice_gives_the_same_bytes_and_prints_nothing(
    checkpoint: Weights,
    fp32: OnnxModel,
    int8: OnnxModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    again = export.export_denoiser(checkpoint, ExportConfig(), tmp_path)
    assert again.sha256 == fp32.sha256
    assert export.quantize(again, tmp_path).sha256 == int8.sha256
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_compute_the_same(checkpoint: Weights, opset: int, tmp_path: Path):
    config = ExportConfig(opset=opset)
    model = export.export_denoiser(checkpoint, config, tmp_path)
    assert model.facts["opset"] == opset
    assert measure(checkpoint, model, config, tmp_path)["relative_error"] < 1e-4
    int8 = export.quantize(model, tmp_path)
    assert measure(checkpoint, int8, config, tmp_path)["relative_error"] < config.int8_tolerance
    for denoiser in (model, int8):
        settings = SampleConfig(steps=3, guidance=1.5, batch_size=5)
        made = export.write(graph.compose(denoiser, settings), tmp_path / "cats.onnx", denoiser.precision)
        assert (made.facts["opset"], graph_check.check(made, denoiser, settings)["max_abs_diff"]) == (opset, 0)


def test_int8_is_smaller_close_and_not_the_same(checkpoint: Weights, fp32: OnnxModel, int8: OnnxModel, tmp_path: Path):
    kinds = {node.op_type for node in onnx.load(int8.path).graph.node}
    assert "MatMulInteger" in kinds
    assert int8.path.stat().st_size < fp32.path.stat().st_size
    error = measure(checkpoint, int8, ExportConfig(), tmp_path)["relative_error"]
    assert 1e-5 < error < 0.15


def test_check_measures_parity_and_size(checkpoint: Weights, fp32: OnnxModel, tmp_path: Path):
    facts = measure(checkpoint, fp32, ExportConfig(), tmp_path)
    network, _ = load_generator(checkpoint.path)
    assert facts["bytes"] == fp32.path.stat().st_size
    assert facts["checkpoint_bytes"] == checkpoint.path.stat().st_size
    assert facts["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    per_time = [facts[f"relative_error_t{t}"] for t in ("0", "0.02", "0.5", "0.95", "1")]
    assert facts["patch_size"] == network.config.patch_size
    assert 0 < facts["relative_error"] == max(per_time) < 1e-4
    assert (tmp_path / "check-fp32.json").is_file()


def test_an_error_beyond_the_tolerance_is_refused_with_value_limit_and_advice(checkpoint: Weights, int8: OnnxModel, tmp_path: Path):
    with pytest.raises(ExportError, match=r"relative error 0\.0\d+ at t=.*allowed 1e-06 \(export.int8_tolerance\).*int8 to false"):
        export.check(checkpoint, int8, ExportConfig(int8_tolerance=1e-6), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_wrong_weight_is_found(checkpoint: Weights, fp32: OnnxModel, tmp_path: Path):
    model = onnx.load(fp32.path)
    table = next(item for item in model.graph.initializer if item.name == "class_embed.weight")
    values = np.frombuffer(table.raw_data, np.float32).reshape(14, 32).copy()
    values[13] += 1  # the null class alone
    table.raw_data = values.tobytes()
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"differs from the trained network.*Try another export.opset"):
        export.check(checkpoint, fp32.model_copy(update={"path": path, "sha256": sha256_of(path)}), ExportConfig(), tmp_path)


def test_a_file_of_another_network_is_refused(fp32: OnnxModel, tmp_path: Path):
    larger = make_checkpoint(tmp_path / "larger.safetensors", image_size=32)
    with pytest.raises(ExportError, match=r"its image_size is 16, that of .*larger.safetensors is 32.*Export the model again"):
        export.check(larger, fp32, ExportConfig(), tmp_path)
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ExportError, match="its source_sha256 is"):
        export.check(other, fp32, ExportConfig(), tmp_path)


def test_damaged_missing_and_foreign_files_are_named(
    checkpoint: Weights, fp32: OnnxModel, classifier_onnx: OnnxModel, tmp_path: Path
):
    short, foreign = tmp_path / "short.onnx", tmp_path / "foreign.onnx"
    short.write_bytes(fp32.path.read_bytes()[:5000])
    model = onnx.load(fp32.path)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    with pytest.raises(ExportError, match=r"short.onnx is not a complete ONNX file .*export again"):
        onnx_file.onnx_velocity(short)
    with pytest.raises(ExportError, match="foreign.onnx is not a denoiser of this project"):
        onnx_file.onnx_velocity(foreign)
    with pytest.raises(ExportError, match="absent.onnx does not exist"):
        onnx_file.onnx_velocity(tmp_path / "absent.onnx")
    with pytest.raises(ExportError, match="classifier.onnx is not a denoiser of this project"):
        onnx_file.onnx_velocity(classifier_onnx.path)
    with pytest.raises(ExportError, match="denoiser-fp32.onnx is not a classifier of this project"):
        export.onnx_logits(fp32.path)
    changed = fp32.model_copy(update={"path": short})
    with pytest.raises(ExportError, match="short.onnx is not a complete ONNX file"):
        export.check(checkpoint, changed, ExportConfig(), tmp_path)


@pytest.mark.skipif("cuda" in onnx_file.onnx_devices(), reason="onnxruntime can use CUDA here")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available provider names")
def test_the_cpu_is_never_taken_for_a_gpu(fp32: OnnxModel):
    assert onnx_file.onnx_devices() == ["cpu"]
    with pytest.raises(ExportError, match=r"cannot run .* on cuda\..*set compute.device to 'cpu'"):
        onnx_file.onnx_velocity(fp32.path, "cuda")


def test_no_file_is_left_where_the_checkpoint_is_damaged(checkpoint: Weights, tmp_path: Path):
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoint.path.read_bytes()[:-100])
    damaged = checkpoint.model_copy(update={"path": short, "sha256": sha256_of(short)})
    with pytest.raises(CheckpointError):
        export.export_denoiser(damaged, ExportConfig(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_sampling_runs_on_the_file_with_its_threads_alone(checkpoint: Weights, fp32: OnnxModel, monkeypatch: pytest.MonkeyPatch):
    network, _ = load_generator(checkpoint.path)
    settings = SampleConfig(steps=3, batch_size=5)
    labels = torch.tensor([0, 3, 12, 5, 5, 1, 2])
    wanted = sampling.sample(network, labels, 16, 13, settings).int()
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    found = sampling.sample(onnx_file.onnx_velocity(fp32.path), labels, 16, 13, settings).int()
    assert asked == [1, torch.get_num_threads()]
    assert wanted.float().std() > 10
    assert (found - wanted).abs().max() <= 1


@pytest.mark.parametrize("batch", [1, 3, 26])
def test_the_classifier_gives_what_the_network_gives_of_images_as_they_are_stored(
    classifier: Weights, classifier_onnx: OnnxModel, dataset: Dataset, batch: int
):
    images = load_split(dataset, "test")[0][:batch]
    wanted = predict(load_classifier(classifier.path), images)
    assert wanted.shape == (batch, 13)
    assert wanted.std() > 0.01
    torch.testing.assert_close(export.onnx_logits(classifier_onnx.path)(images), wanted, rtol=1e-4, atol=1e-4)


def test_the_classifier_says_what_it_is_and_how_it_was_checked(
    classifier: Weights, classifier_onnx: OnnxModel, dataset: Dataset, tmp_path: Path
):
    onnx.checker.check_model(classifier_onnx.path, full_check=True)
    assert [path.name for path in classifier_onnx.path.parent.iterdir()] == ["classifier.onnx"]
    text = classifier_onnx.verify().path.read_bytes()
    assert b"site-packages" not in text
    assert os.fsencode(Path(export.__file__).parents[1]) not in text
    facts = metadata(classifier_onnx)
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert (facts["image_size"], facts["backbone"]) == ("16", "resnet8")
    assert facts["source_sha256"] == classifier.sha256
    assert "uint8 RGB" in facts["images"]
    session = onnxruntime.InferenceSession(classifier_onnx.path)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("images", "tensor(uint8)", ["batch", 3, 16, 16])]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [("logits", "tensor(float)", ["batch", 13])]
    found = classifier_onnx.facts
    assert (found["same_class"], found["images"], found["opset"]) == (1, 26, 20)
    assert found["bytes"] == len(text)
    error = found["relative_error"]
    assert isinstance(error, float)
    assert 0 < error < 1e-4
    assert export.export_classifier(classifier, dataset, ExportConfig(), tmp_path).sha256 == classifier_onnx.sha256


def test_a_classifier_file_that_computes_something_else_is_refused_and_not_left(
    classifier: Weights, classifier_onnx: OnnxModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wrong = onnx.load(classifier_onnx.path)
    bias = next(item for item in wrong.graph.initializer if item.name == "head.bias")
    values = np.frombuffer(bias.raw_data, np.float32).copy()
    values[7] += 10
    bias.raw_data = values.tobytes()
    monkeypatch.setattr(export, "_trace", lambda *arguments: wrong)
    with pytest.raises(ExportError, match=r"relative error \d.*allowed 0\.001 .*export\.opset"):
        export.export_classifier(classifier, dataset, ExportConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_of_other_images_is_refused(classifier: Weights, two_colours: Dataset, tmp_path: Path):
    with pytest.raises(ExportError, match="sees 16 px and the data set has 8 px"):
        export.export_classifier(classifier, two_colours, ExportConfig(), tmp_path)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_classifier_at_other_opsets(classifier: Weights, dataset: Dataset, opset: int, tmp_path: Path):
    assert export.export_classifier(classifier, dataset, ExportConfig(opset=opset), tmp_path).facts["opset"] == opset
