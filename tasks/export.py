"""The export stages: ONNX files of the denoiser, of the whole sampler and of the classifier, checked, and how fast it draws."""

from collections.abc import Sequence

import pandas as pd

from tasks import show
from tasks.cache import key_of
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.config import ComputeConfig, EvaluateConfig, ExportConfig, SampleConfig
from tinycats_core.files import home
from tinycats_core.progress import waiting
from tinycats_core.records import Dataset, InferenceReport, OnnxModel, Precision, Weights
from tinycats_core.release import card_onnx, export, forms, graph_check, inference, precision


@stage(export.export_denoiser)
def export_onnx(checkpoint: Weights, config: ExportConfig) -> OnnxModel:
    """Write the denoiser as ONNX, with a dynamic batch."""
    with waiting("exporting"):
        return export.export_denoiser(checkpoint, config, home("export") / key_of(checkpoint, config))


@stage(export.quantize)
def quantize(model: OnnxModel) -> OnnxModel:
    """Write the ONNX file again with int8 weights."""
    with waiting("quantizing"):
        return export.quantize(model, home("export") / key_of(model))


@stage(export.check)
def check_onnx(checkpoint: Weights, model: OnnxModel, config: ExportConfig) -> OnnxModel:
    """Compare the ONNX file with the network it was made from: parity, size."""
    with waiting("checking the ONNX file"):
        checked = export.check(checkpoint, model, config, home("export") / key_of(checkpoint, model, config))
    show.table(f"onnx-{model.precision}", _frame(checked), f"denoiser-{model.precision}.onnx against PyTorch")
    return checked


@stage(graph_check.export_graph)
def export_graph(model: OnnxModel, sample: SampleConfig, config: ExportConfig) -> OnnxModel:
    """Write the denoiser and the whole sampler as one ONNX file, and compare what it draws, here and without tinycats."""
    folder = home("export") / key_of(model, sample, config)
    with waiting("building the graph"):
        made = graph_check.export_graph(model, sample, config, folder)
    show.table(f"graph-{model.precision}", _frame(made), f"{made.path.name} against the sampler on {model.path.name}")
    return made


@stage(forms.make)
def export_forms(checkpoint: Weights, model: OnnxModel, sample: SampleConfig, config: ExportConfig) -> tuple[OnnxModel, ...]:
    """Write the graph in the other forms that may ship."""
    with waiting("building the graph in other forms"):
        return forms.make(checkpoint, model, sample, config, home("export") / key_of(checkpoint, model, sample, config))


@stage(inference.benchmark)
def benchmark_inference(
    checkpoint: Weights, graphs: Sequence[OnnxModel], config: SampleConfig, compute: ComputeConfig
) -> InferenceReport:
    """Measure how fast each runtime draws on this machine: latency, throughput, memory, time to load."""
    folder = home("export") / key_of(checkpoint, graphs, config)
    with waiting("measuring the speed"):
        report = inference.benchmark(checkpoint, graphs, config, folder, compute.device)
    machine = report.facts["machine"]
    what = f"Whole images in {config.steps} steps on {machine['cpu']}, threads: {machine['torch_threads']}"
    show.table("inference", pd.json_normalize(report.facts["rows"]), what)
    log().info("how fast it draws: %s", ", ".join(f"{name} {ratio:.2f}" for name, ratio in report.facts["ratios"].items()))
    for note in report.facts["notes"]:
        log().info(note)
    return report


@stage(precision.choose)
def choose_precision(
    graphs: Sequence[OnnxModel],
    speed: InferenceReport,
    dataset: Dataset,
    sample: SampleConfig,
    judging: EvaluateConfig,
    config: ExportConfig,
    classifier: Weights | None,
    compute: ComputeConfig,
) -> Precision:
    """Compare what the graphs draw and how fast, and choose the one that the release recommends."""
    folder, shared = home("export") / key_of(graphs, speed, dataset, sample, judging, config), home("evaluations")
    with waiting("comparing the forms"):
        chosen = precision.choose(graphs, speed, dataset, sample, judging, config, classifier, folder, shared, compute.device)
    head, rows = card_onnx.precision_table(chosen.facts)
    show.table("precision", pd.DataFrame(rows, columns=head), f"cats-{chosen.chosen}.onnx is recommended: {chosen.facts['rule']}")
    log().info("recommended: cats-%s.onnx", chosen.chosen)
    return chosen


@stage(export.export_classifier)
def export_classifier(checkpoint: Weights, dataset: Dataset, config: ExportConfig) -> OnnxModel:
    """Write the breed classifier as ONNX, and compare it with the network it was made from on real images."""
    folder = home("export") / key_of(checkpoint, dataset, config)
    with waiting("exporting the classifier"):
        model = export.export_classifier(checkpoint, dataset, config, folder)
    show.table("onnx-classifier", _frame(model), "classifier.onnx against PyTorch")
    return model


def _frame(model: OnnxModel) -> pd.DataFrame:
    return show.metrics_frame({"value": {k: v for k, v in model.facts.items() if isinstance(v, int | float)}})
