"""ONNX files at work: a session of onnxruntime as the velocity that the samplers ask for."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinycats_core.errors import ExportError, printable
from tinycats_core.generator import drawing

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    from torch import Tensor

    from tinycats_core.generator.sampling import Velocity

DENOISER, GRAPH, CLASSIFIER = "tinycats-denoiser/1", drawing.FORMAT, "tinycats-classifier/1"
OUTPUT = "velocity"
ALONE = "alone"  # in the metadata of a denoiser: why an image must be drawn without others in its batch
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnx_velocity(path: Path, device: str = "cpu") -> "Velocity":
    """Return the velocity field of an ONNX file of this project, run on the CPU or with CUDA: usable wherever the network is.

    Raises:
        ExportError: the file is missing, damaged, or not a denoiser of this project; onnxruntime cannot use the device.
    """
    import torch

    return OnnxVelocity(open_session(path, DENOISER, device, torch.get_num_threads()))


def onnx_devices() -> list[str]:
    """Return where the installed onnxruntime can run: `cpu`, and `cuda` where it was built for it."""
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in offered]


def open_session(
    path: Path, format: str, device: str = "cpu", threads: int = 0, content: bytes | None = None
) -> "onnxruntime.InferenceSession":
    """Open an ONNX file of this project. Imports no PyTorch.

    Args:
        threads: 0 for as many as onnxruntime takes by itself.
        content: what is opened in place of what lies in the file, which it was made of.

    Raises:
        ExportError: as `onnx_velocity`.
    """
    import onnxruntime

    if not path.is_file():
        raise ExportError(f"{path} does not exist. Export the model again.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised; what it prints of a file may hold anything
    try:
        session = onnxruntime.InferenceSession(content or path, options, providers=[PROVIDERS[device]])
    except Exception as error:  # its many kinds of errors have no common base
        reason = " ".join(str(error).split())[-300:]  # what is wrong stands at the end
        raise ExportError(
            f"{path} is not a complete ONNX file ({reason}). Delete it and export again; if its opset is newer "
            "than onnxruntime knows, install a newer one."
        ) from error
    if PROVIDERS[device] not in session.get_providers():  # it falls back to the CPU and says so in its log alone
        raise ExportError(
            f"onnxruntime cannot run {path} on {device}. Install what it needs there, or set compute.device to 'cpu'."
        )
    if session.get_modelmeta().custom_metadata_map.get("format") != format:
        kind = format.partition("/")[0].removeprefix("tinycats-")
        raise ExportError(f"{path} is not a {kind} of this project: its metadata has no format {format}. Export again.")
    return session


def require_self_contained(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file that holds all of its weights itself, without running it.

    Raises:
        ExportError: the file is missing or damaged, or names another file for its weights.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ExportError(f"{path} does not exist. Export the model again.")
    try:
        model = onnx.load_model(path, load_external_data=False)
        elsewhere = next((tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL), None)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
    except (DecodeError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not a complete ONNX file ({printable(error)}). Delete it and export again.") from None
    if elsewhere is not None:
        named = next((entry.value for entry in elsewhere.external_data if entry.key == "location"), "")
        raise ExportError(
            f"{path} reads weights from another file ({printable(named)}), which no model of this project does. Do not run it."
        )
    return metadata


def _tensors(message: Any) -> "Iterator[onnx.TensorProto]":
    """Return every tensor of a model, in whatever part of it."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from _tensors(item)


class OnnxVelocity:
    own_threads = True  # for `sampling.sample`

    def __init__(self, session: "onnxruntime.InferenceSession"):
        self.session = session
        self.alone = ALONE in session.get_modelmeta().custom_metadata_map  # likewise

    def __call__(self, x: "Tensor", t: "Tensor", labels: "Tensor") -> "Tensor":
        import torch

        feeds = {"x": x.float(), "t": t.float(), "labels": labels.long()}
        (result,) = self.session.run([OUTPUT], {name: value.cpu().numpy() for name, value in feeds.items()})
        return torch.from_numpy(result).to(x.device)
