"""The export stages: ONNX files of the denoiser, checked against PyTorch."""

from tasks import show
from tasks.stage import key_of, stage
from tinycats_core import export
from tinycats_core.config import ExportConfig
from tinycats_core.files import home
from tinycats_core.records import Checkpoint, OnnxModel


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
    frame = show.metrics_frame({"value": {k: v for k, v in checked.facts.items() if isinstance(v, int | float)}})
    show.table(f"onnx-{model.precision}", frame, f"denoiser-{model.precision}.onnx against PyTorch")
    return checked
