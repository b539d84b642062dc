"""How fast a release draws: whole images by the shipped settings, in PyTorch and in onnxruntime.

    tinycats bench releases/tinycats-smoke/latest

Each runtime is measured in a fresh process of its own, so that its memory and the time that its file takes to load are
nobody else's. They run one after another, so what else the machine does meanwhile may fall on one of them alone: a row records
that load and the spread of its times, is measured once more if either is large, and has a note if it stays so.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinycats_core import __version__
from tinycats_core import threads as threads_
from tinycats_core.config import SampleConfig
from tinycats_core.device import fast_arithmetic, machine, pick_device, synchronize, versions
from tinycats_core.errors import ExportError, TinycatsError
from tinycats_core.files import sha256_of, write_json
from tinycats_core.generator import onnx_file
from tinycats_core.generator.sampling import sample
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import InferenceReport, OnnxModel, Weights
from tinycats_core.tensors import read_header

BATCHES = (1, 4, 8, 16)
PERCENTILES = (50, 95, 99)
WARM_UP = 3  # calls that are not counted
LEAST, MOST = 20, 100  # images of which each latency is taken: what a 95th and a 99th percentile need
LATENCY_SECONDS = 4.0  # after which no more than LEAST are drawn
THROUGHPUT_SECONDS = 0.6  # the same for each larger batch, of which at least two are drawn
MEGABYTE = 2**20
SPREAD, BUSY = 1.5, 0.5  # p75 over p25 of the latency, and cores of other programs, above which a row is measured once more
CHILD = "from tinycats_core.release import inference; inference.answer()"


def benchmark(
    checkpoint: Weights, models: Sequence[OnnxModel], config: SampleConfig, folder: Path, device: str = "auto"
) -> InferenceReport:
    """Measure weights and ONNX files, and write the figures to `folder`."""
    files = {model.precision: model.path for model in models}
    facts = measure(checkpoint.path, files, config, device)
    path = write_json(folder / "inference.json", facts)
    return InferenceReport(path=path, sha256=sha256_of(path), facts=facts)


def measure(weights: Path, models: Mapping[str, Path], config: SampleConfig, device: str = "auto") -> dict[str, Any]:
    """Return how fast each runtime draws, the machine, and the settings, as a JSON value.

    A row a runtime and device, in `rows`: `load_ms`, from the file to what can draw, with the libraries already loaded;
    `latency_ms`, percentiles of the time of one image from noise to pixels, and `repeats`, of how many images;
    `spread`, its 75th over its 25th percentile, and `load`, the cores that other programs took meanwhile;
    `images_per_s` for each batch size; `peak_memory_mb`, of which `memory` says what it is. A percentile that fewer repeats
    cannot tell is None, and `notes` says why. On a GPU every runtime is measured on the CPU as well.

    Args:
        models: the ONNX files by precision.

    Raises:
        CheckpointError: the weights are missing, damaged or of another kind.
        ExportError: an ONNX file is, or a runtime cannot be measured.
    """
    header = read_header(weights, "generator")
    shared = {
        "settings": config.model_dump(mode="json"),
        "image_size": header["model"]["image_size"],
        "num_classes": header["model"]["num_classes"],
        "threads": torch.get_num_threads(),
    }
    files = {"pytorch": weights, **{f"onnx-{precision}": path for precision, path in models.items()}}
    devices = ["cpu", "cuda"] if pick_device(device).type == "cuda" else ["cpu"]
    places = [
        {"runtime": runtime, "device": where, "path": str(path.absolute())}
        for where in devices
        for runtime, path in files.items()
        if runtime == "pytorch" or where in onnx_file.onnx_devices()
    ]
    rows = [_settled(place | shared) for place in places]
    return {
        "machine": {**machine(), **versions("torch", "onnx", "onnxruntime", "onnxruntime-gpu"), "tinycats": __version__},
        "sample": config.model_dump(mode="json", exclude={"batch_size"}),
        "warm_up": WARM_UP,
        "rows": rows,
        "ratios": _ratios(rows),
        "notes": _notes(rows),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p95 and p99 in milliseconds; None where not one of so few times lies beyond it."""
    enough = {q: len(seconds) >= _needed(q) for q in PERCENTILES}
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) if enough[q] else None for q in PERCENTILES}


def repeat(call: Callable[[], object], warm_up: int, least: int, most: int, budget: float) -> list[float]:
    """Return the seconds of each call after the warm-up: at least `least`, then more until `budget` seconds or `most` calls."""
    for _ in range(warm_up):
        call()
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < budget):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def answer() -> None:
    """Be the fresh process: read a request from stdin, measure, and print the row as one JSON object, or the error."""
    request = json.load(sys.stdin)
    try:
        result = _measure_here(**request)
    except TinycatsError as error:
        result = {"error": str(error)}
    print(json.dumps(result, allow_nan=False), flush=True)


def _settled(request: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one runtime; if it is unsteady, the better of two measurements."""
    row = _ask(request)
    if not _unsteady(row):
        return row
    again = _ask(request)
    return min(row, again, key=lambda found: (_unsteady(found), found["latency_ms"]["p50"]))


def _unsteady(row: Mapping[str, Any]) -> bool:
    return row["spread"] > SPREAD or (row["load"] or 0.0) > BUSY


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Return the row of one runtime, measured in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
    if done.returncode or not lines:
        raise ExportError(
            f"{request['runtime']} could not be measured on {request['device']}: its process ended with {done.returncode} "
            f"({lines[-1] if lines else 'and said nothing'}). Free memory, or set compute.device to another, and try again."
        )
    row = json.loads(lines[-1])
    if "error" in row:
        raise ExportError(row["error"])
    return row


def _measure_here(
    runtime: str, device: str, path: str, settings: dict[str, Any], image_size: int, num_classes: int, threads: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    config = SampleConfig.model_validate(settings)
    place, drawn_on = torch.device(device), torch.device(device if runtime == "pytorch" else "cpu")
    onnx_file.onnx_devices()  # the library is there before the clock starts
    torch.zeros(1, device=place)  # and so is the GPU
    what, memory = _memory(runtime, place)
    started = time.perf_counter()
    velocity = load_generator(Path(path), place)[0] if runtime == "pytorch" else onnx_file.onnx_velocity(Path(path), device)
    synchronize(place)
    load_seconds = time.perf_counter() - started

    def draw(count: int) -> None:
        labels = torch.arange(count) % num_classes
        sample(velocity, labels, image_size, num_classes, config.model_copy(update={"batch_size": count}), drawn_on)

    before = threads_.reading()
    with fast_arithmetic(drawn_on):
        latency = repeat(lambda: draw(1), WARM_UP, LEAST, MOST, LATENCY_SECONDS)
        per_s = {"1": len(latency) / sum(latency)}
        for batch in BATCHES[1:]:
            seconds = repeat(lambda count=batch: draw(count), 1, 2, MOST, THROUGHPUT_SECONDS)
            per_s[str(batch)] = batch * len(seconds) / sum(seconds)
        peak = memory()
    return {
        "runtime": runtime,
        "device": device,
        "load_ms": 1000 * load_seconds,
        "latency_ms": percentiles(latency),
        "repeats": len(latency),
        "spread": float(np.percentile(latency, 75) / np.percentile(latency, 25)),
        "load": threads_.between(before, threads_.reading()),
        "images_per_s": per_s,
        "peak_memory_mb": peak / MEGABYTE,
        "memory": what,
    }


def _memory(runtime: str, device: torch.device) -> tuple[str, Callable[[], int]]:
    """Return what is measured of the memory, and a function of how many bytes that has come to since now."""
    if device.type == "cuda" and runtime == "pytorch":
        torch.cuda.reset_peak_memory_stats(device)
        return "tensors on the GPU", lambda: torch.cuda.max_memory_allocated(device)
    if device.type == "cuda":  # onnxruntime keeps what it has taken, so that what is in use at the end is the peak
        free = torch.cuda.mem_get_info(device)[0]
        return "growth of what is in use on the GPU", lambda: free - torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten, proc_pid_clear_refs(5)
    before = _peak_resident()
    return "growth of the process's resident memory", lambda: _peak_resident() - before


def _peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M):
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _needed(percentile: int) -> int:
    """Return of how many times one lies beyond a percentile."""
    return 100 // (100 - percentile)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how many times as fast as another runtime one draws an image on the CPU, by the medians."""
    times = {row["runtime"]: row["latency_ms"]["p50"] for row in rows if row["device"] == "cpu"}
    pairs = {"fp32_over_int8": ("onnx-fp32", "onnx-int8"), "pytorch_over_fp32": ("pytorch", "onnx-fp32")}
    return {name: times[slow] / times[fast] for name, (slow, fast) in pairs.items() if {slow, fast} <= times.keys()}


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['runtime']} on {row['device']} has no {name}: it takes {_needed(int(name[1:]))} images, "
        f"and {row['repeats']} were drawn; after {LATENCY_SECONDS:g} s no more than {LEAST} are."
        for row in rows
        for name, value in row["latency_ms"].items()
        if value is None
    ] + [
        f"{row['runtime']} on {row['device']} was measured beside other programs or unsteadily, twice: they took "
        f"{row['load'] or 0.0:.1f} cores, and the slower quarter of the images took {row['spread']:.1f} times as long as the "
        "faster one; repeat it with `tinycats bench` on an idle machine."
        for row in rows
        if _unsteady(row)
    ]


def measure_release(folder: Path, device: str = "auto") -> dict[str, Any]:
    """Return what `measure` finds of a finished release.

    Raises:
        TinycatsError: it is not an intact release, or a runtime cannot be measured.
    """
    from tinycats_core.release import manifest, shipped  # here, because they would make each measuring process larger

    release = manifest.read_release(folder)
    models = {model.precision: model.path for model in shipped.onnx_models(release)}
    return measure(shipped.generator(release).path, models, shipped.config(release).sample.single(), device)
