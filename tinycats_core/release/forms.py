"""The generator in the forms that `config.forms` lists, as graphs from noise to image."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinycats_core.config import ExportConfig, SampleConfig
from tinycats_core.config.forms import ALWAYS, FORMS
from tinycats_core.generator.onnx_file import require_self_contained
from tinycats_core.generator.samplers import plan_of
from tinycats_core.records import OnnxModel, Weights
from tinycats_core.release import export, graph
from tinycats_core.release.tables import tabulate

if TYPE_CHECKING:
    import onnx

SMALLEST_HALVED = 1024  # numbers; in float16 a smaller tensor saves less than the cast to float32 takes


def make(
    weights: Weights, denoiser: OnnxModel, settings: SampleConfig, config: ExportConfig, folder: Path
) -> tuple[OnnxModel, ...]:
    """Write the graph in each of the forms that `config` names to `cats-<name>.onnx`, and return their records.

    A table that is larger than the layers in its place, as with many steps, is left out: it would only be slower to load.

    Args:
        denoiser: the fp32 file of the weights.

    Raises:
        ExportError: the network cannot be expressed in an opset, or not be tabulated.
    """
    import onnx

    sources: dict[int | None, onnx.ModelProto] = {None: onnx.load(denoiser.path)}
    made = []
    for name in config.forms:
        form = FORMS[name]
        if form.weights == "int8" and not config.int8:
            continue
        if form.opset not in sources:
            newer = config.model_copy(update={"opset": form.opset})
            sources[form.opset] = onnx.load(export.export_denoiser(weights, newer, folder / "again").path)
        tables, source = None, sources[form.opset]
        if form.table:
            times = [evaluation.t for evaluation in plan_of(settings)]
            source, tables = tabulate(source, times, int(require_self_contained(denoiser.path)["null_class"]) + 1)
            tables = {key: table.astype(np.float16) for key, table in tables.items()}
            if sum(table.nbytes for table in tables.values()) > sources[form.opset].ByteSize() - source.ByteSize():
                continue
        stored = {"fp32": lambda model: model, "fp16": halved, "int8": export.quantized}[form.weights](source)
        made.append(export.write(graph.build(stored, denoiser.sha256, settings, tables), folder / f"cats-{name}.onnx", name))
    return tuple(made)


def halved(source: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return a denoiser that holds its weights in float16 and casts them to float32 when it is loaded."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    made = ModelProto()
    made.CopyFrom(source)
    casts = []
    for item in made.graph.initializer:
        if item.data_type == TensorProto.FLOAT and np.prod(item.dims) >= SMALLEST_HALVED:
            half, name = numpy_helper.to_array(item).astype(np.float16), item.name
            item.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
            casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], f"{name}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def shipped(graphs: Sequence[OnnxModel], chosen: str) -> tuple[OnnxModel, ...]:
    """Return the graphs that a release holds: those that every release has, and the chosen one."""
    return tuple(one for one in graphs if one.precision in (*ALWAYS, chosen))
