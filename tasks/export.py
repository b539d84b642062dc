"""The export stages: ONNX files of the denoiser and of the classifier, checked against PyTorch."""

import pandas as pd

from tasks import show
from tasks.stage import key_of, stage
from tinycats_core import export
from tinycats_core.config import ExportConfig
from tinycats_core.files import home
from tinycats_core.records import Checkpoint, Dataset, OnnxModel


@stage(version=1)
def export_onnx(checkpoint: Checkpoint, config: ExportConfig) -> OnnxModel:
    """Write the denoiser as ONNX, with a dynamic batch."""
    return export.export_denoiser(checkpoint, config, home() / "export" / key_of(checkpoint, config))


@stage(version=1)
def quantize(model: OnnxModel) -> OnnxModel:
    """Write the ONNX file again with int8 weights."""
    return export.quantize(model, home() / "export" / key_of(model))


@stage(version=2)
def check_onnx(checkpoint: Checkpoint, model: OnnxModel, config: ExportConfig) -> OnnxModel:
    """Compare the ONNX file with the network it was made from: parity, size, speed."""
    checked = export.check(checkpoint, model, config, home() / "export" / key_of(checkpoint, model, config))
    show.table(f"onnx-{model.precision}", _frame(checked), f"denoiser-{model.precision}.onnx against PyTorch")
    return checked


@stage(version=1)
def export_classifier(checkpoint: Checkpoint, dataset: Dataset, config: ExportConfig) -> OnnxModel:
    """Write the breed classifier as ONNX, and compare it with the network it was made from on real images."""
    folder = home() / "export" / key_of(checkpoint, dataset, config)
    model = export.export_classifier(checkpoint, dataset, config, folder)
    show.table("onnx-classifier", _frame(model), "classifier.onnx against PyTorch")
    return model


def _frame(model: OnnxModel) -> pd.DataFrame:
    return show.metrics_frame({"value": {k: v for k, v in model.facts.items() if isinstance(v, int | float)}})
