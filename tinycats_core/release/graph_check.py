"""What a graph draws, held against the sampler on the denoiser file that it was made of: here, and where there is no tinycats."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinycats_core.config import ExportConfig, SampleConfig
from tinycats_core.errors import ExportError
from tinycats_core.files import atomic_path
from tinycats_core.generator import drawing, onnx_file, sampling
from tinycats_core.records import OnnxModel
from tinycats_core.release import export, graph, stranger

if TYPE_CHECKING:
    import onnxruntime

GUIDANCES = (1.0, 1.5, 3.0)  # besides the release's own
BATCHES = (1, 5)
Draw = Callable[[Tensor, int], np.ndarray]  # labels and the size of a batch to images, uint8 (N, S, S, 3)
SECONDS = 600  # in which a fresh process must have drawn


def export_graph(model: OnnxModel, settings: SampleConfig, config: ExportConfig, folder: Path) -> OnnxModel:
    """Write the graph of a denoiser file as `cats-<precision>.onnx`. Its record holds what `check` and `check_alone` found.

    Raises:
        ExportError: the denoiser file cannot be used, or a pixel differs by more than export.pixel_tolerance. No file is left then.
    """
    final = folder / f"cats-{model.precision}.onnx"
    with atomic_path(final) as path:
        made = export.write(graph.compose(model, settings), path, model.precision)
        found = check(made, model, settings) | check_alone(made, _sampler(made, model, settings), settings, final.name)
        require(found, final.name, config.pixel_tolerance)
    allowed = {"tolerance": config.pixel_tolerance, "denoiser_bytes": model.path.stat().st_size}
    return made.model_copy(update={"path": final, "facts": made.facts | found | allowed})


def require(found: Mapping[str, Any], name: str, allowed: int) -> None:
    """Raise ExportError if a difference that `check` or `check_alone` found is larger than allowed."""
    for kind in ("max_abs_diff", "alone_max_abs_diff", "script_max_abs_diff"):
        if not found.get(kind, 0) <= allowed:
            raise ExportError(
                f"{name} does not draw the images that it should: {kind} is {found[kind]} of 255, "
                f"allowed is {allowed} (export.pixel_tolerance). Try another export.opset, or allow more."
            )


def check(made: OnnxModel, model: OnnxModel, settings: SampleConfig) -> dict[str, int]:
    """Return the largest difference of a pixel, `max_abs_diff`, over how many `images`: every class at some guidance."""
    session = onnx_file.open_session(made.path, onnx_file.GRAPH, threads=torch.get_num_threads())
    velocity, (size, count) = onnx_file.onnx_velocity(model.path), _shape(session)
    cases = [(guidance, batch) for guidance in dict.fromkeys((settings.guidance, *GUIDANCES)) for batch in BATCHES]
    share, worst, images = math.ceil(count / len(cases)), 0, 0
    for number, (guidance, batch) in enumerate(cases):
        labels = (torch.arange(max(share, batch)) + number * share) % count
        asked = settings.model_copy(update={"guidance": guidance, "batch_size": batch})
        wanted = _as_pixels(sampling.sample(velocity, labels, size, count, asked))
        found = drawing.draw(session, labels.tolist(), asked.seed, guidance, batch)
        worst, images = max(worst, _difference(found, wanted)), images + len(labels)
    return {"max_abs_diff": worst, "images": images}


def check_alone(made: OnnxModel, draw: Draw, settings: SampleConfig, name: str) -> dict[str, int | str]:
    """Return the same of a fresh process that has Python, NumPy and onnxruntime alone, and of the release's sample.py there.

    Args:
        draw: what the graph should draw, of labels and the size of a batch.
        name: of the file in a release.

    Raises:
        ExportError: it does not end, or ends with an error.
    """
    session = onnx_file.open_session(made.path, onnx_file.GRAPH, threads=1)
    size, count = _shape(session)
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    together, apart = (draw(torch.arange(count), batch) for batch in (count, 1))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        np.savez(
            place / "case.npz",
            noise=drawing.noise(range(count), size, settings.seed),
            labels=np.arange(count),
            guidance=np.array(settings.guidance, np.float32),
            images=together.transpose(0, 3, 1, 2),
        )
        (place / "release").mkdir()
        shutil.copyfile(drawing.__file__, place / "release" / "sample.py")
        shutil.copyfile(made.path, place / "release" / name)
        done = _run(place, name)
        drawn = np.stack([np.asarray(Image.open(place / "cats" / f"{breed}-0.png")) for breed in classes])
    return {**{f"alone_{key}": value for key, value in done.items()}, "script_max_abs_diff": _difference(drawn, apart)}


def _run(place: Path, model: str) -> dict[str, int | str]:
    """Return what `stranger` prints in a folder that holds `case.npz` and a part of a release."""
    script = ["release/sample.py", "--model", model, "--out", "cats"]
    command = [sys.executable, "-I", stranger.__file__, "case.npz", f"release/{model}", *script]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{model} drew nothing in {SECONDS} s in a process of its own. Try again on an idle machine.") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise ExportError(f"{model} cannot be drawn with by NumPy and onnxruntime alone: the process said {said[-1]!r}.")
    return json.loads(done.stdout.splitlines()[-1])


def _shape(session: "onnxruntime.InferenceSession") -> tuple[int, int]:
    """Return the image size and the number of classes."""
    facts = session.get_modelmeta().custom_metadata_map
    return int(facts["image_size"]), int(facts["null_class"])


def _sampler(made: OnnxModel, model: OnnxModel, settings: SampleConfig) -> Draw:
    """Return the sampler on the denoiser file that a graph was made of."""
    size, count = _shape(onnx_file.open_session(made.path, onnx_file.GRAPH, threads=1))
    velocity = onnx_file.onnx_velocity(model.path)

    def draw(labels: Tensor, batch: int) -> np.ndarray:
        asked = settings.model_copy(update={"batch_size": batch})
        return _as_pixels(sampling.sample(velocity, labels, size, count, asked))

    return draw


def _as_pixels(images: Tensor) -> np.ndarray:
    """Return images (N, 3, S, S) as (N, S, S, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def _difference(found: np.ndarray, wanted: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - wanted).max())
