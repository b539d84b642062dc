"""The trained networks as ONNX files, and the check that they compute what PyTorch computes: denoiser and classifier."""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinycats_core.config import ExportConfig
from tinycats_core.data.splits import load_split
from tinycats_core.errors import ExportError
from tinycats_core.evaluation.classifier import load_classifier, predict
from tinycats_core.files import atomic_path, sha256_of, write_atomically, write_json
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.onnx_file import ALONE, CLASSIFIER, DENOISER, OUTPUT, OnnxVelocity, open_session
from tinycats_core.generator.sampling import Velocity, initial_noise
from tinycats_core.generator.weights import GeneratorHeader, load_generator
from tinycats_core.records import Dataset, OnnxModel, Weights

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CONVENTION = "t=0 noise, t=1 data, x_t = t*x1 + (1-t)*x0, velocity = x1 - x0; images are RGB, value = pixel/127.5 - 1"
INPUTS = ("x", "t", "labels")
PICTURES = "uint8 RGB, (batch, 3, image_size, image_size); cut to the largest square in the middle, then resized by Lanczos"
TIMES = (0.0, 0.02, 0.5, 0.95, 1.0)  # where parity is measured: both ends, near both ends, and the middle
PARITY_BATCH = 3
PARITY_IMAGES = 256  # real ones, for the classifier


def export_denoiser(checkpoint: Weights, config: ExportConfig, folder: Path) -> OnnxModel:
    """Write the denoiser as one ONNX file: x (B, 3, S, S) f32, t (B,) f32, labels (B,) int64 to velocity (B, 3, S, S).

    Its metadata says what it is: image size, classes, null class, convention, prediction, and the sha256 of the weights.

    Raises:
        ExportError: the network cannot be expressed in this opset.
    """
    network, header = load_generator(checkpoint.path)
    size = network.config.image_size
    example = (torch.zeros(2, 3, size, size), torch.tensor([0.25, 0.75]), torch.tensor([0, network.config.num_classes]))
    model = _trace(network, example, INPUTS, OUTPUT, config.opset)
    facts = {
        "format": DENOISER,
        "image_size": str(header.model.image_size),
        "classes": json.dumps(header.classes),
        "null_class": str(header.model.num_classes),
        "convention": CONVENTION,
        "prediction": header.model.prediction,
        "source_sha256": checkpoint.sha256,
    }
    _describe(model, facts)
    return write(model, folder / "denoiser-fp32.onnx", "fp32")


def quantize(model: OnnxModel, folder: Path) -> OnnxModel:
    """Write a copy of a denoiser file whose matrix products use int8 weights and activations, as `quantized` describes."""
    import onnx

    return write(quantized(onnx.load(model.path)), folder / "denoiser-int8.onnx", "int8")


def quantized(source: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a denoiser whose matrix products use int8 weights, one scale for each column, and int8 activations.

    The activations' scale is computed at each call (dynamic quantisation), over the whole batch, so its metadata asks for
    images to be drawn one by one. The last layer, under 1 % of the weights, stays in fp32: on a trained network of 1.3M
    parameters that took the largest relative error from 3.2 % to 1.3 %.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    weights = {initializer.name for initializer in source.graph.initializer}
    products = [node.name for node in source.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    with tempfile.TemporaryDirectory() as temporary:
        prepared, result = Path(temporary, "prepared.onnx"), Path(temporary, "quantized.onnx")
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            result,
            op_types_to_quantize=["MatMul"],  # linear layers with a bias are turned into a product and a sum first
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=products[-1:],
        )
        made = onnx.load(result)
    _describe(made, {**{entry.key: entry.value for entry in source.metadata_props}, ALONE: "one scale of activations a batch"})
    return made


def check(checkpoint: Weights, model: OnnxModel, config: ExportConfig, folder: Path) -> OnnxModel:
    """Measure an ONNX file against the network that it was made of, and return its record with the measurements.

    Parity: the relative error ‖a − b‖ / ‖b‖ of the velocity at several times, for every class and the null class, in batches
    of 1 and 3, on the states that the network itself passes through on its way from noise to image.

    Raises:
        ExportError: the file is damaged, of another network, or its error exceeds the tolerance of its precision.
    """
    network, header = load_generator(checkpoint.path)
    session = open_session(model.path, DENOISER, threads=torch.get_num_threads())
    _require_same(session, header, checkpoint, model)
    velocity = OnnxVelocity(session)
    errors = _relative_errors(network, velocity)
    worst = max(errors, key=errors.__getitem__)
    tolerance = config.fp32_tolerance if model.precision == "fp32" else config.int8_tolerance
    if not errors[worst] <= tolerance:  # NaN is beyond it too
        raise ExportError(
            f"{model.path} differs from the trained network: relative error {errors[worst]:.3g} at t={worst:g}, allowed "
            f"{tolerance:g} (export.{model.precision}_tolerance). "
            + ("Try another export.opset." if model.precision == "fp32" else "Set export.int8 to false, or allow more.")
        )
    facts = {
        **model.facts,
        "checkpoint_bytes": checkpoint.path.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "patch_size": header.model.patch_size,
        "relative_error": errors[worst],
        **{f"relative_error_t{t:g}": error for t, error in errors.items()},
        "tolerance": tolerance,
    }
    write_json(folder / f"check-{model.precision}.json", facts)
    return model.model_copy(update={"facts": facts})


def export_classifier(checkpoint: Weights, dataset: Dataset, config: ExportConfig, folder: Path) -> OnnxModel:
    """Write the breed classifier as `classifier.onnx`: images (B, 3, S, S) uint8 to logits (B, classes) f32.

    The file normalises the images itself. Its metadata says what it is: classes, image size, what the images are, and the
    sha256 of the weights. Parity: the largest difference of a logit from PyTorch's, by the largest logit, and the share of
    images that are put into the same class, over up to 256 held-out images (training images if none are held out).

    Raises:
        ExportError: the network cannot be expressed in this opset, the images are not of its size, or the error exceeds
            export.fp32_tolerance. No file is left then.
    """
    network = load_classifier(checkpoint.path)
    size = network.image_size
    if dataset.image_size != size:
        raise ExportError(
            f"{checkpoint.path} sees {size} px and the data set has {dataset.image_size} px. Train the classifier on this data set."
        )
    model = _trace(network, (torch.zeros(2, 3, size, size, dtype=torch.uint8),), ["images"], "logits", config.opset)
    facts = {
        "format": CLASSIFIER,
        "image_size": str(size),
        "classes": json.dumps(network.classes),
        "images": PICTURES,
        "backbone": network.backbone_name,
        "source_sha256": checkpoint.sha256,
    }
    _describe(model, facts)
    images = next(split for name in ("test", "train") if len(split := load_split(dataset, name)[0]))
    images = images[torch.linspace(0, len(images) - 1, min(len(images), PARITY_IMAGES)).long()]  # of every class
    wanted = predict(network, images)
    with atomic_path(folder / "classifier.onnx") as path:
        written = write(model, path, "fp32")
        found = onnx_logits(path)(images)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        same = (found.argmax(1) == wanted.argmax(1)).double().mean().item()
        if not error <= config.fp32_tolerance:  # NaN is beyond it too
            raise ExportError(
                f"the ONNX file of {checkpoint.path} differs from the trained classifier: relative error {error:.3g}, allowed "
                f"{config.fp32_tolerance:g} (export.fp32_tolerance). Try another export.opset."
            )
    parity = {"relative_error": error, "tolerance": config.fp32_tolerance, "same_class": same, "images": len(images)}
    return written.model_copy(update={"path": folder / "classifier.onnx", "facts": written.facts | parity})


def onnx_logits(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the classifier of an ONNX file of this project, run on the CPU: logits (N, classes) of uint8 images (N, 3, S, S).

    Raises:
        ExportError: the file is missing, damaged, or not a classifier of this project.
    """
    session = open_session(path, CLASSIFIER, threads=torch.get_num_threads())

    def logits(images: Tensor) -> Tensor:
        (result,) = session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(result)

    return logits


def _trace(network: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], output: str, opset: int) -> "onnx.ModelProto":
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # It warns that several inputs share one batch axis, which is what is meant.
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        try:
            program = torch.onnx.export(
                network,
                example,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes={name: {0: batch} for name in inputs},
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            name = type(network).__name__
            raise ExportError(f"the network ({name}) cannot be exported at export.opset={opset}: {reason} Try 20.") from error
    assert program is not None  # None is for the old exporter
    model = program.model_proto
    graph = model.graph
    # The exporter notes stack traces with paths of this machine, and shapes that the quantiser would stumble over.
    del graph.value_info[:]
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    return model


def _describe(model: "onnx.ModelProto", facts: Mapping[str, str]) -> None:
    from onnx.helper import set_model_props

    set_model_props(model, dict(facts))


def write(model: "onnx.ModelProto", path: Path, precision: str) -> OnnxModel:
    """Write a valid model in one step, and return its record."""
    import onnx

    onnx.checker.check_model(model, full_check=True)
    write_atomically(path, lambda temporary: onnx.save(model, temporary))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    facts: dict[str, float | int | str | None] = {"bytes": path.stat().st_size, "opset": opset}
    return OnnxModel(path=path, sha256=sha256_of(path), precision=precision, facts=facts)


def _require_same(session: "onnxruntime.InferenceSession", header: GeneratorHeader, checkpoint: Weights, model: OnnxModel) -> None:
    found = session.get_modelmeta().custom_metadata_map
    wanted = {
        "image_size": str(header.model.image_size),
        "classes": json.dumps(header.classes),
        "source_sha256": checkpoint.sha256,
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ExportError(
                f"{model.path} was made of another network: its {key} is {found.get(key)}, that of {checkpoint.path} is {value}. "
                "Export the model again."
            )


@torch.inference_mode()
def _relative_errors(network: TinyDiT, velocity: Velocity) -> dict[float, float]:
    """Return ‖a − b‖ / ‖b‖ of the velocity at each time of TIMES, over all classes and batch sizes."""
    config = network.config
    count = math.ceil((config.num_classes + 1) / PARITY_BATCH) * PARITY_BATCH
    labels = torch.arange(count) % (config.num_classes + 1)
    x = initial_noise(range(count), config.image_size, seed=0)
    errors = {}
    for t, t_next in zip(TIMES, (*TIMES[1:], 1.0), strict=True):
        times = torch.full((count,), t)
        batches = [*torch.arange(count).split(PARITY_BATCH), torch.tensor([len(errors) % count])]
        wanted = torch.cat([network(x[b], times[b], labels[b]) for b in batches])
        found = torch.cat([velocity(x[b], times[b], labels[b]) for b in batches])
        errors[t] = float((found - wanted).norm() / wanted.norm())
        x = x + (t_next - t) * wanted[:count]
    return errors
