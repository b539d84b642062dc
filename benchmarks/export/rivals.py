"""Who draws: the graphs and their peers, each in a fresh process of its own, so that nobody waits for another's threads."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tinycats_core import threads
from tinycats_core.config import SampleConfig
from tinycats_core.config.forms import FORMS

Draw = Callable[[int], object]  # draws as many images at a time


@dataclass(frozen=True)
class Files:
    """What there is to draw with."""

    weights: Path
    denoiser: Path  # at the opset with which OpenVINO is fastest
    graphs: Mapping[str, Path]  # by precision
    settings: SampleConfig
    threads: int


def _by_graph(precision: str) -> Callable[[Files], Draw]:
    def enter(files: Files) -> Draw:
        from tinycats_core.generator import drawing, onnx_file

        one, many = (
            onnx_file.open_session(files.graphs[precision], onnx_file.GRAPH, threads=threads) for threads in (files.threads, 1)
        )
        classes, settings = int(one.get_modelmeta().custom_metadata_map["null_class"]), files.settings

        def draw(batch: int) -> object:
            session, workers = (one, 1) if batch == 1 else (many, files.threads)
            return drawing.draw(session, _labels(batch, classes), settings.seed, settings.guidance, workers=workers)

        return draw

    return enter


def _by_pytorch(files: Files, compiled: bool = False) -> Draw:
    import torch

    from tinycats_core.generator.weights import load_generator

    network, header = load_generator(files.weights)
    velocity = torch.compile(network, dynamic=False) if compiled else network
    return _by_sampler(velocity, header.model.image_size, header.model.num_classes, files.settings)


def _by_compiled(files: Files) -> Draw:
    return _by_pytorch(files, compiled=True)


def _by_openvino(files: Files) -> Draw:
    import torch

    from tinycats_core.generator import onnx_file

    compiled, facts = _openvino(files.denoiser, files.threads), onnx_file.require_self_contained(files.denoiser)

    class Velocity:
        own_threads = True

        def __call__(self, x: Any, t: Any, labels: Any) -> Any:
            found = compiled({"x": x.numpy(), "t": t.numpy(), "labels": labels.numpy()})
            return torch.from_numpy(found[0].copy())

    return _by_sampler(Velocity(), int(facts["image_size"]), int(facts["null_class"]), files.settings)


def _by_openvino_graph(files: Files) -> Draw:
    from tinycats_core.generator import drawing, onnx_file

    path = files.graphs["fp32"]
    compiled, facts = _openvino(path, files.threads), onnx_file.require_self_contained(path)
    size, classes, settings = int(facts["image_size"]), int(facts["null_class"]), files.settings

    def draw(batch: int) -> object:
        guidance = np.array(settings.guidance, np.float32)
        noise = drawing.noise(range(batch), size, settings.seed)
        return compiled({"noise": noise, "labels": np.array(_labels(batch, classes)), "guidance": guidance})[0]

    return draw


RIVALS: dict[str, Callable[[Files], Draw]] = {
    **{f"graph {name}": _by_graph(name) for name in FORMS},
    "PyTorch": _by_pytorch,
    "torch.compile": _by_compiled,
    "OpenVINO": _by_openvino,
    "OpenVINO, graph": _by_openvino_graph,
}


def available(quick: bool, graphs: Iterable[str] = FORMS) -> list[str]:
    """Return who can draw here, with the graphs that there are. A quick run compiles nothing."""
    here = {"OpenVINO": find_spec("openvino") is not None, "torch.compile": not quick}
    here |= {f"graph {name}": name in graphs for name in FORMS}
    return [name for name in RIVALS if here.get(name.partition(",")[0], True)]


def race(
    names: Iterable[str], files: Files, batches: Sequence[int], rounds: int, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds an image by batch size and name: median, 95th percentile and least of all rounds, taken in turns.

    `load` is how many cores other programs took meanwhile.
    """
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in names}
        for entered in [pool.submit(_enter, name, files, batches) for name, pool in pools.items()]:
            entered.result()
        taken: dict[int, dict[str, list[float]]] = {batch: {name: [] for name in pools} for batch in batches}
        loads: dict[int, dict[str, list[float]]] = {batch: {name: [] for name in pools} for batch in batches}
        for _ in range(rounds):
            for batch in batches:
                for name, pool in pools.items():
                    times, load = pool.submit(_turn, batch, seconds).result()
                    taken[batch][name] += times
                    loads[batch][name] += [] if load is None else [load]
    return {
        str(batch): {
            name: _figures(np.array(times) * 1000 / batch) | {"load": float(np.mean(loads[batch][name] or [0]))}
            for name, times in of_batch.items()
        }
        for batch, of_batch in taken.items()
    }


_here: dict[str, Draw] = {}  # in a process of its own: what it draws with


def _enter(name: str, files: Files, batches: Sequence[int]) -> None:
    """Load, and draw with each batch size once."""
    import torch

    torch.set_num_threads(files.threads)
    _here["draw"] = RIVALS[name](files)
    for batch in batches:
        _here["draw"](batch)


def _turn(batch: int, seconds: float) -> tuple[list[float], float | None]:
    """Return the seconds of each call, at least one, and the cores that other programs took."""
    taken: list[float] = []
    before = threads.reading()
    while sum(taken) < seconds:
        started = time.perf_counter()
        _here["draw"](batch)
        taken.append(time.perf_counter() - started)
    return taken, threads.between(before, threads.reading())


def _by_sampler(velocity: Any, size: int, classes: int, settings: SampleConfig) -> Draw:
    import torch

    from tinycats_core.device import fast_arithmetic
    from tinycats_core.generator.sampling import sample

    def draw(batch: int) -> object:
        with fast_arithmetic(torch.device("cpu")):
            asked = settings.model_copy(update={"batch_size": batch})
            return sample(velocity, torch.tensor(_labels(batch, classes)), size, classes, asked)

    return draw


def _openvino(path: Path, threads: int) -> Any:
    import openvino  # pyright: ignore[reportMissingImports]

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(path, "CPU", settings)


def _labels(batch: int, classes: int) -> list[int]:
    return [label % classes for label in range(batch)]


def _figures(values: np.ndarray) -> dict[str, float]:
    return {"p50": float(np.median(values)), "p95": float(np.percentile(values, 95)), "min": float(values.min())}
