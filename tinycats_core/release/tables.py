"""Tables in place of layers: what the sampler's times and the classes alone decide is computed once, for each pair of them.

A sampler evaluates the network at a few known times, and there are a few classes. What depends on nothing else, the modulation
of all blocks (adaLN), is then a table, and its layers need not ship.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycats_core.errors import ExportError
from tinycats_core.generator.onnx_file import OUTPUT

if TYPE_CHECKING:
    import onnx

Tables = Mapping[str, np.ndarray]  # by the name of a denoiser's input, (evaluations · (classes + 1), …)
LABELS = "labels"


def tabulate(denoiser: "onnx.ModelProto", times: Sequence[float], classes: int) -> tuple["onnx.ModelProto", dict[str, np.ndarray]]:
    """Return the denoiser without the layers that the images do not reach, and what these compute: its further inputs.

    Row i · classes + c of each table is of times[i] and class c.

    Args:
        classes: how many there are, the null class included.

    Raises:
        ExportError: what these layers compute is not one row an image.
    """
    import onnxruntime
    from onnx import helper

    graph = denoiser.graph
    reached = _reached(graph)
    inner = [node for node in graph.node if reached.issuperset(node.output)]
    outer = [node for node in graph.node if not reached.issuperset(node.output)]
    made = {name for node in outer for name in node.output if name}
    edge = list(dict.fromkeys(name for node in inner for name in node.input if name in made))
    layers = _model(denoiser, outer, graph.input[1:], [helper.make_empty_tensor_value_info(name) for name in edge])
    session = onnxruntime.InferenceSession(layers.SerializeToString())
    feeds = {"t": np.repeat(np.asarray(times, np.float32), classes), LABELS: np.tile(np.arange(classes), len(times))}
    found: Any = session.run(edge, {given.name: feeds[given.name] for given in session.get_inputs()})
    tables: dict[str, np.ndarray] = dict(zip(edge, found, strict=True))
    rows = len(times) * classes
    if wrong := [name for name, table in tables.items() if table.shape[:1] != (rows,) or table.dtype != np.float32]:
        raise ExportError(f"the network cannot be tabulated: {wrong[0]} is not one row of numbers an image.")
    typed = helper.make_tensor_value_info
    further = [
        typed(name, helper.np_dtype_to_tensor_dtype(table.dtype), ["batch", *table.shape[1:]]) for name, table in tables.items()
    ]
    core = _model(denoiser, inner, [*graph.input, *further], graph.output)
    return core, tables


def _reached(graph: "onnx.GraphProto") -> set[str]:
    """Return the tensors that depend on the images."""
    reached = {graph.input[0].name}
    for node in graph.node:
        if not reached.isdisjoint(node.input):
            reached.update(name for name in node.output if name)
    assert OUTPUT in reached
    return reached


def _model(
    denoiser: "onnx.ModelProto",
    nodes: Sequence["onnx.NodeProto"],
    inputs: Sequence["onnx.ValueInfoProto"],
    outputs: Sequence["onnx.ValueInfoProto"],
) -> "onnx.ModelProto":
    """Return a part of a denoiser, with the weights that it uses."""
    from onnx import helper

    used = {name for node in nodes for name in node.input}
    weights = [item for item in denoiser.graph.initializer if item.name in used]
    made = helper.make_model(
        helper.make_graph(nodes, "part", inputs, outputs, weights),
        opset_imports=denoiser.opset_import,
        ir_version=denoiser.ir_version,
    )
    helper.set_model_props(made, {entry.key: entry.value for entry in denoiser.metadata_props})
    return made
