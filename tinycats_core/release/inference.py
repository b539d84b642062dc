"""How fast a release draws: whole images by the shipped settings, in PyTorch and in onnxruntime.

    tinycats bench releases/tinycats-smoke/latest

Each runtime is measured in a fresh process of its own, so that its memory and the time that its file takes to load are
nobody else's. The processes draw in turns, round by round, so that whatever else the machine does falls on all of them. A row
records that load and the spread of its times; if either is large, all rounds are repeated once, and a note says if it stays so.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinycats_core import __version__
from tinycats_core import threads as threads_
from tinycats_core.config import SampleConfig
from tinycats_core.device import fast_arithmetic, machine, pick_device, synchronize, versions
from tinycats_core.errors import ExportError, TinycatsError
from tinycats_core.files import sha256_of, write_json
from tinycats_core.generator import drawing, onnx_file
from tinycats_core.generator.sampling import sample
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import InferenceReport, OnnxModel, Weights
from tinycats_core.tensors import read_header

if TYPE_CHECKING:
    import onnxruntime

BATCHES = (1, 4, 8, 16)
PERCENTILES = (50, 95, 99)
WARM_UP = 3  # calls that are not counted
LEAST, MOST = 20, 100  # images of which each latency is taken: what a 95th and a 99th percentile need
ROUNDS = 4  # in each of which every runtime draws a part of its images
LATENCY_SECONDS = 4.0  # after which no more than LEAST are drawn
THROUGHPUT_SECONDS = 0.6  # the same for each larger batch, of which at least two are drawn
MEGABYTE = 2**20
SPREAD, BUSY = 1.5, 0.5  # p75 over p25 of the latency, and cores of other programs, above which all is measured once more
CHILD = "from tinycats_core.release import inference; inference.answer()"


def benchmark(
    checkpoint: Weights, graphs: Sequence[OnnxModel], config: SampleConfig, folder: Path, device: str = "auto"
) -> InferenceReport:
    """Measure weights and graphs, and write the figures to `folder`."""
    files = {graph.precision: graph.path for graph in graphs}
    facts = measure(checkpoint.path, files, config, device)
    path = write_json(folder / "inference.json", facts)
    return InferenceReport(path=path, sha256=sha256_of(path), facts=facts)


def measure(weights: Path, graphs: Mapping[str, Path], config: SampleConfig, device: str = "auto") -> dict[str, Any]:
    """Return how fast each runtime draws, the machine, and the settings, as a JSON value.

    A row a runtime and device, in `rows`: `load_ms`, from the file to what can draw, with the libraries already loaded;
    `latency_ms`, percentiles of the time of one image from noise to pixels, and `repeats`, of how many images;
    `spread`, its 75th over its 25th percentile, and `load`, the cores that other programs took meanwhile;
    `images_per_s` for each batch size; `peak_memory_mb`, of which `memory` says what it is. A percentile that fewer repeats
    cannot tell is None, and `notes` says why. On a GPU every runtime is measured on the CPU as well.

    Args:
        graphs: the ONNX files from noise to image, by precision.

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
    files = {"pytorch": weights, **{f"onnx-{precision}": path for precision, path in graphs.items()}}
    devices = ["cpu", "cuda"] if pick_device(device).type == "cuda" else ["cpu"]
    places = [
        {"runtime": runtime, "device": where, "path": str(path.absolute())}
        for where in devices
        for runtime, path in files.items()
        if runtime == "pytorch" or where in onnx_file.onnx_devices()
    ]
    rows = _measure_in_turns([place | shared for place in places])
    return {
        "machine": {**machine(), **versions("torch", "onnx", "onnxruntime", "onnxruntime-gpu"), "tinycats": __version__},
        "sample": config.model_dump(mode="json", exclude={"batch_size"}),
        "warm_up": WARM_UP,
        "rows": rows,
        "ratios": _ratios(rows),
        "notes": _notes(rows),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p95 and p99 in milliseconds; None if there are too few times to have one beyond it."""
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
    """Be the fresh process: answer each line of stdin, a JSON request, with a line of JSON, its result or an error."""
    here = _Here()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            result = getattr(here, method)(*arguments)
        except TinycatsError as error:
            result = {"error": str(error)}
        print(json.dumps(result, allow_nan=False), flush=True)


class _Here:
    """A runtime in this process: it is loaded, draws in rounds, and says at its end how much memory it took."""

    def ready(self) -> bool:
        """Import the libraries before any clock starts."""
        onnx_file.onnx_devices()
        return True

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        self.request, self.config = request, SampleConfig.model_validate(request["settings"])
        runtime, device, path = request["runtime"], request["device"], Path(request["path"])
        place = torch.device(device)
        self.drawn_on = torch.device(device if runtime == "pytorch" else "cpu")
        torch.zeros(1, device=place)  # so that the GPU is there, too
        what, self.memory = _memory(runtime, place)
        started = time.perf_counter()
        self.network, self.session = None, None
        if runtime == "pytorch":
            self.network = load_generator(path, place)[0]
        else:
            self.session = self._session(request["threads"])
        synchronize(place)
        return {"runtime": runtime, "device": device, "load_ms": 1000 * (time.perf_counter() - started), "memory": what}

    def round(self, number: int) -> dict[str, Any]:
        """Return the seconds of each draw by batch size, and the cores that other programs took."""
        part, seconds = 1 / ROUNDS, {}
        before = threads_.reading()
        with fast_arithmetic(self.drawn_on):
            for batch in BATCHES:
                least, budget = (LEAST, LATENCY_SECONDS) if batch == 1 else (2, THROUGHPUT_SECONDS)
                warm_up = (WARM_UP if batch == 1 else 1) if number == 0 else 0
                counts = (math.ceil(least * part), math.ceil(MOST * part))
                seconds[str(batch)] = repeat(lambda count=batch: self._draw(count), warm_up, *counts, budget * part)
        return {"seconds": seconds, "load": threads_.between(before, threads_.reading())}

    def end(self) -> int | None:
        return self.memory()

    def _session(self, threads: int) -> "onnxruntime.InferenceSession":
        return onnx_file.open_session(Path(self.request["path"]), onnx_file.GRAPH, self.request["device"], threads)

    @cached_property
    def _many(self) -> "onnxruntime.InferenceSession":
        """What draws several images on a CPU, each on a core of its own."""
        return self._session(1)

    def _draw(self, count: int) -> None:
        request, config = self.request, self.config
        labels = torch.arange(count) % request["num_classes"]
        if self.network is not None:
            batch = config.model_copy(update={"batch_size": count})
            sample(self.network, labels, request["image_size"], request["num_classes"], batch, self.drawn_on)
        elif count == 1 or request["device"] != "cpu":
            drawing.draw(self.session, labels.tolist(), config.seed, config.guidance, count)
        else:
            drawing.draw(self._many, labels.tolist(), config.seed, config.guidance, workers=request["threads"])


class _Process:
    """A fresh process that measures one runtime. It ends with the block."""

    def __init__(self, request: dict[str, Any]):
        self.request = request
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", CHILD]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.child.kill()
        self.child.communicate()

    def tell(self, *request: Any) -> None:
        with suppress(BrokenPipeError):  # `hear` says why
            print(json.dumps(request), file=self.child.stdin, flush=True)

    def hear(self) -> Any:
        """Return the answer to what was told. Raises ExportError if there is none, or if it is an error."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            said = self.child.communicate()[1].splitlines()
            raise ExportError(
                f"{self.request['runtime']} could not be measured on {self.request['device']}: its process ended with "
                f"{self.child.returncode} ({said[-1] if said else 'and said nothing'}). Free memory, or set compute.device to "
                "another, and try again."
            )
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise ExportError(answer["error"])
        return answer

    def ask(self, *request: Any) -> Any:
        self.tell(*request)
        return self.hear()


def _measure_in_turns(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each runtime; if one is unsteady, for each the steadier of two measurements."""
    with ExitStack() as stack:
        runtimes = [stack.enter_context(_Process(request)) for request in requests]
        for runtime in runtimes:
            runtime.tell("ready")  # they import the libraries at the same time
        for runtime in runtimes:
            runtime.hear()
        loaded = [runtime.ask("load", request) for runtime, request in zip(runtimes, requests, strict=True)]

        def rounds(first: int) -> list[dict[str, Any]]:
            by_round = [[runtime.ask("round", first + number) for runtime in runtimes] for number in range(ROUNDS)]
            return [_figures(of_one) for of_one in zip(*by_round, strict=True)]

        figures = rounds(0)
        if any(map(_unsteady, figures)):
            figures = [_steadier(*pair) for pair in zip(figures, rounds(ROUNDS), strict=True)]
        peaks = [runtime.ask("end") for runtime in runtimes]
        peaks = [{"peak_memory_mb": None if peak is None else peak / MEGABYTE} for peak in peaks]
    return [{**start, **found, **peak} for start, found, peak in zip(loaded, figures, peaks, strict=True)]


def _figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a runtime from all its rounds."""
    seconds = {str(batch): [second for part in rounds for second in part["seconds"][str(batch)]] for batch in BATCHES}
    loads = [part["load"] for part in rounds if part["load"] is not None]
    latency = seconds["1"]
    return {
        "latency_ms": percentiles(latency),
        "repeats": len(latency),
        "spread": float(np.percentile(latency, 75) / np.percentile(latency, 25)),
        "load": round(sum(loads) / len(loads), 2) if loads else None,
        "images_per_s": {batch: int(batch) * len(taken) / sum(taken) for batch, taken in seconds.items()},
    }


def _steadier(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return min(first, second, key=lambda found: (_unsteady(found), found["latency_ms"]["p50"]))


def _unsteady(row: Mapping[str, Any]) -> bool:
    return row["spread"] > SPREAD or (row["load"] or 0.0) > BUSY


def _memory(runtime: str, device: torch.device) -> tuple[str, Callable[[], int | None]]:
    """Return what is measured of the memory, and a function of how many bytes that has come to since now; None on Windows."""
    if device.type == "cuda" and runtime == "pytorch":
        torch.cuda.reset_peak_memory_stats(device)
        return "tensors on the GPU", lambda: torch.cuda.max_memory_allocated(device)
    if device.type == "cuda":  # onnxruntime keeps what it has taken, so that what is in use at the end is the peak
        free = torch.cuda.mem_get_info(device)[0]
        return "growth of what is in use on the GPU", lambda: free - torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        return "not measured on Windows", lambda: None
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten, proc_pid_clear_refs(5)
    before = _peak_resident()
    return "growth of the process's resident memory", lambda: _peak_resident() - before


def _peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes. Not on Windows."""
    import resource

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
    from tinycats_core.release import export, graph, manifest, shipped  # here: they would make each measuring process larger

    release = manifest.read_release(folder)
    settings = shipped.config(release).sample.single()
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        graphs = shipped.graphs(release) or [  # a release from before there were graphs
            export.write(graph.compose(model, settings), Path(scratch, f"{model.precision}.onnx"), model.precision)
            for model in shipped.onnx_models(release)
        ]
        return measure(shipped.generator(release).path, {one.precision: one.path for one in graphs}, settings, device)
