"""Measure what is exported: the pixels, bytes, load and speed of the graphs, and what int8 costs in quality.

    python -m benchmarks.export [--release FOLDER]

Two networks: one that has been trained on drawn cats of 32 px, from a release or trained here, and one of 33 million random
weights at 128 px. The graphs are held against the sampler on the denoiser files. Their peers are PyTorch, eager and compiled, and
OpenVINO if it is installed, with the denoiser at opset 23 and with the graph. Everybody draws whole images in turns, each in a
process of its own. The figures at the top are the worst of both networks and all batch sizes; a speedup is that of the
fastest graph with int8 weights by the medians, against the faster of two peers of one library; `by_least` is the same by the
least times, which other programs on the machine disturb less.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import TINY, command_line, positive, report
from tinycats_core.config import ExportConfig, ModelConfig, ReleaseConfig, SampleConfig
from tinycats_core.records import Dataset, OnnxModel, Weights

BATCHES = (1, 8)
GUIDANCES = (1.0, 1.5, 3.0)
BARS = {"bytes_ratio": 0.3, "graph_size_ratio": 1.05, "load_ratio": 2.0}  # at most
FASTER = 2.0  # than PyTorch, at least
PEERS = {
    "speedup_vs_torch": ("PyTorch",),
    "speedup_vs_compiled": ("torch.compile",),
    "speedup_vs_openvino": ("OpenVINO", "OpenVINO, graph"),
}
TRAINING: dict[str, Any] = {"train": {"steps": 1000, "snapshots": 2}, "evaluate": {"samples": 520}}  # a release is trained longer
LARGE = ModelConfig()
LARGE_QUICK = ModelConfig(image_size=32, patch_size=4, width=192, depth=2, heads=3)


@dataclass(frozen=True)
class Network:
    """What is exported, and how it draws."""

    name: str
    weights: Weights
    settings: SampleConfig
    size: int
    classes: int


@dataclass(frozen=True)
class Judge:
    """What tells how good the trained network's images are."""

    config: ReleaseConfig
    dataset: Dataset
    classifier: Weights | None


@dataclass(frozen=True)
class Cases:
    """For which images the graph is held against the sampler."""

    samplers: Sequence[str]
    batches: Sequence[int]
    images: int


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where every bar is met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", type=Path, help="the folder of a release at 32 px; default: a short training")
    parser.add_argument("--rounds", type=positive, default=3, help="how often everybody takes a turn (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small networks, nothing compiled, under a minute")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = measure(given, Path(scratch))
    report("export", figures, given)
    return 0 if figures["holds"] or given.quick else 1


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the figures of both networks, and the worst of each."""
    from benchmarks.export.rivals import available
    from tinycats_core.device import versions
    from tinycats_core.generator.samplers import SAMPLERS

    small, judge = released(given.release, scratch / "small") if given.release else trained(given.quick, scratch / "small")
    if "OpenVINO" not in available(given.quick):
        print("OpenVINO is not installed and takes no part: pip install openvino", flush=True)
    large = random_network(LARGE_QUICK if given.quick else LARGE, small.settings, scratch / "large")
    every, few = Cases(tuple(SAMPLERS), (1, 5), small.classes), Cases((small.settings.sampler,), (1, 3), 3)
    rows, models = {}, {}
    for network, cases in ((small, every), (large, few)):
        rows[network.name], models[network.name] = row(network, cases, given, scratch / network.name)
        print({network.name: rows[network.name]}, flush=True)
    quality = kid(judge, small, models[small.name], scratch / "judged")

    def worst(pick: Any, name: str) -> Any:
        found = [value for of_one in rows.values() for value in _values(of_one[name])]
        return pick(found) if found else None

    figures = {
        "max_abs_diff": worst(max, "max_abs_diff"),
        **{name: worst(max, name) for name in BARS},
        **{name: worst(min, name) for name in PEERS},
        **quality,
    }
    holds = figures["max_abs_diff"] == 0 and figures["kid_delta"] <= figures["kid_bound"]
    holds &= figures["speedup_vs_torch"] >= FASTER and all(figures[name] <= bar for name, bar in BARS.items())
    return {**figures, "holds": holds, "peers": versions("openvino"), "networks": rows}


def released(folder: Path, scratch: Path) -> tuple[Network, Judge]:
    """Return the network of a release, and what it was judged by. Raises TinycatsError."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.release import manifest, shipped

    release = manifest.read_release(folder)
    config = shipped.locate_data(release, shipped.config(release))
    dataset = shipped.require_same_data(release, prepare(config.data, scratch / "data"))
    judge = Judge(config, dataset, shipped.classifier(release))
    return Network(
        "small", shipped.generator(release), config.sample.single(), config.model.image_size, len(dataset.classes)
    ), judge


def trained(quick: bool, scratch: Path) -> tuple[Network, Judge]:
    """Train the smoke preset's network, or a tiny one, for a moment."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.presets import resolve
    from tinycats_core.training.start import train

    small = {"train": {"steps": 60, "snapshots": 1, "checkpoint_every": 60, "sample_every": 60, "ema_decays": [0.9]}}
    tiny = {**TINY, "train": {**TINY["train"], **small["train"]}, "classifier": {"epochs": 1, "backbone": "mobilenet_v3_small"}}
    config = resolve("smoke", tiny if quick else TRAINING)
    dataset = prepare(config.data, scratch / "data")
    config = config.for_classes(len(dataset.classes))
    classifier = train_classifier(dataset, config.classifier, scratch / "classifier", "cpu")
    weights = train(dataset, config.model, config.train, scratch / "run", "cpu").ema
    settings = config.sample.at(1.5, (0.0, 1.0))
    return Network("small", weights, settings, config.model.image_size, len(dataset.classes)), Judge(config, dataset, classifier)


def random_network(model: ModelConfig, settings: SampleConfig, folder: Path) -> Network:
    """Return a network of random weights; those that begin at zero, which would make it draw grey, are random, too."""
    import torch

    from tinycats_core.config import CLASSES
    from tinycats_core.generator.model import TinyDiT
    from tinycats_core.generator.weights import save_generator

    torch.manual_seed(0)
    network = TinyDiT(model)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    weights = save_generator(folder / "random.safetensors", network.state_dict(), model, CLASSES, step=0)
    return Network("large", weights, settings, model.image_size, model.num_classes)


def row(network: Network, cases: Cases, given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[OnnxModel]]:
    """Return the figures of a network, and its denoiser files."""
    import torch

    from benchmarks.export.rivals import Files, available, race
    from tinycats_core.release import export, forms, graph

    fp32 = export.export_denoiser(network.weights, ExportConfig(), folder)
    models = [fp32, export.quantize(fp32, folder)]
    graphs = [export.write(graph.compose(m, network.settings), folder / f"cats-{m.precision}.onnx", m.precision) for m in models]
    pairs = list(zip(graphs, models, strict=True))
    size = {made.path.stem: made.path.stat().st_size for made in (*models, *graphs)}
    load = loads([model.path for model in (*models, *graphs)])
    newer = fp32 if given.quick else export.export_denoiser(network.weights, ExportConfig(opset=23), folder / "opset23")
    others = () if given.quick else forms.make(network.weights, fp32, network.settings, ExportConfig(), folder / "forms")
    paths = {made.precision: made.path for made in (*graphs, *others)}
    files = Files(network.weights.path, newer.path, paths, network.settings, torch.get_num_threads())
    times = race(available(given.quick, paths), files, BATCHES, given.rounds, 0.2 if given.quick else 2.0)
    return {
        "parameters": sum(parameter.numel() for parameter in _parameters(network.weights)),
        "image_size": network.size,
        "max_abs_diff": largest_difference(network, models, cases),
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
        "bytes_ratio": size["cats-int8"] / size["cats-fp32"],
        "graph_size_ratio": [size[made.path.stem] / size[model.path.stem] for made, model in pairs],
        "load_ms": load,
        "load_ratio": [load[made.path.stem] / load[model.path.stem] for made, model in pairs],
        "ms_per_image": times,
        **{name: _speedups(times, peers, "p50") for name, peers in PEERS.items()},
        "by_least": {name: _speedups(times, peers, "min") for name, peers in PEERS.items()},
    }, models


def largest_difference(network: Network, models: Iterable[OnnxModel], cases: Cases) -> int:
    """Return the largest difference of a pixel between the graphs and the sampler on the denoiser files."""
    import numpy as np
    import torch

    from tinycats_core.generator import drawing, onnx_file
    from tinycats_core.generator.sampling import sample
    from tinycats_core.release import graph

    labels, worst = torch.arange(cases.images) % network.classes, 0
    for model in models:
        velocity = onnx_file.onnx_velocity(model.path)
        for sampler in cases.samplers:
            settings = network.settings.model_copy(update={"sampler": sampler})
            content = graph.compose(model, settings).SerializeToString()
            session = onnx_file.open_session(model.path, onnx_file.GRAPH, threads=torch.get_num_threads(), content=content)
            for guidance in GUIDANCES:
                for batch in cases.batches:
                    asked = settings.model_copy(update={"guidance": guidance, "batch_size": batch})
                    wanted = sample(velocity, labels, network.size, network.classes, asked).permute(0, 2, 3, 1).numpy()
                    found = drawing.draw(session, labels.tolist(), asked.seed, guidance, batch)
                    worst = max(worst, int(np.abs(found.astype(int) - wanted).max()))
    return worst


def loads(paths: Sequence[Path], repeats: int = 7) -> dict[str, float]:
    """Return the median milliseconds that onnxruntime takes to load each file, taken in turns."""
    import onnxruntime

    taken: dict[str, list[float]] = {path.stem: [] for path in paths}
    for _ in range(repeats):
        for path in paths:
            started = time.perf_counter()
            onnxruntime.InferenceSession(path)
            taken[path.stem].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in taken.items()}


def kid(judge: Judge, network: Network, models: Iterable[OnnxModel], folder: Path) -> dict[str, float]:
    """Return by how much the KID of int8 exceeds that of fp32 with the same noise, and what the gate would allow.

    The denoiser files draw, whose pixels are those of the graphs.
    """
    from tinycats_core.evaluation.fidelity import evaluate
    from tinycats_core.evaluation.samples import draw_samples

    config, found = judge.config.evaluate, {}
    for model in models:
        path = folder / f"{model.precision}.safetensors"
        drawn = draw_samples(model, judge.dataset, network.settings, config.samples, path, "cpu")
        found[model.precision] = evaluate(drawn, judge.dataset, config, judge.classifier, folder / model.precision, "cpu").metrics
    name = f"kid_{config.extractor}"
    errors = [figures[f"{name}_drawn_std"] ** 2 for figures in found.values()]
    bound = config.tolerance * sum(errors) ** 0.5
    return {
        "kid_delta": found["int8"][name] - found["fp32"][name],
        "kid_bound": bound,
        **{f"kid_{precision}": figures[name] for precision, figures in found.items()},
    }


def _speedups(times: dict[str, dict[str, dict[str, float]]], peers: Sequence[str], figure: str) -> dict[str, float]:
    """Return how many times as fast as the fastest of these peers the fastest graph with int8 weights draws, by batch size."""
    best = {batch: [found[peer][figure] for peer in peers if peer in found] for batch, found in times.items()}
    ours = {batch: min(found[name][figure] for name in found if name.startswith("graph int8")) for batch, found in times.items()}
    return {batch: min(taken) / ours[batch] for batch, taken in best.items() if taken}


def _values(found: Any) -> list[Any]:
    return list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]


def _parameters(weights: Weights) -> Iterable[Any]:
    from tinycats_core.generator.weights import load_generator

    return load_generator(weights.path)[0].parameters()


if __name__ == "__main__":
    sys.exit(main())
