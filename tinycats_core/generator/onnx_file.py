"""ONNX files at work: a session of onnxruntime as the velocity that the samplers ask for."""

from pathlib import Path
from typing import TYPE_CHECKING

from tinycats_core.errors import ExportError

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

    from tinycats_core.generator.sampling import Velocity

DENOISER, CLASSIFIER = "tinycats-denoiser/1", "tinycats-classifier/1"  # formats
OUTPUT = "velocity"
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


def open_session(path: Path, format: str, device: str = "cpu", threads: int = 0) -> "onnxruntime.InferenceSession":
    """Open an ONNX file of this project. Imports no PyTorch.

    Args:
        threads: 0 for as many as onnxruntime takes by itself.

    Raises:
        ExportError: as `onnx_velocity`.
    """
    import onnxruntime

    if not path.is_file():
        raise ExportError(f"{path} does not exist. Export the model again.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[PROVIDERS[device]])
    except Exception as error:  # its many kinds of errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path} is not a complete ONNX file ({reason}). Delete it and export again.") from error
    if PROVIDERS[device] not in session.get_providers():  # it falls back to the CPU and says so in its log alone
        raise ExportError(
            f"onnxruntime cannot run {path} on {device}. Install what it needs there, or set compute.device to 'cpu'."
        )
    if session.get_modelmeta().custom_metadata_map.get("format") != format:
        kind = format.partition("/")[0].removeprefix("tinycats-")
        raise ExportError(f"{path} is not a {kind} of this project: its metadata has no format {format}. Export again.")
    return session


class OnnxVelocity:
    own_threads = True  # for `sampling.sample`

    def __init__(self, session: "onnxruntime.InferenceSession"):
        self.session = session

    def __call__(self, x: "Tensor", t: "Tensor", labels: "Tensor") -> "Tensor":
        import torch

        feeds = {"x": x.float(), "t": t.float(), "labels": labels.long()}
        (result,) = self.session.run([OUTPUT], {name: value.cpu().numpy() for name, value in feeds.items()})
        return torch.from_numpy(result).to(x.device)
