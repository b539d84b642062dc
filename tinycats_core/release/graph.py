"""From noise to image in one ONNX file: the sampler as a loop around a denoiser file, without tracing the network again.

The weights lie in the loop's body. Outside of it, onnxruntime would neither fold constants nor pack weights, and the pixels
would not be those of the denoiser file. Steps that were written out one by one would take seconds to load.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinycats_core.config import SampleConfig
from tinycats_core.errors import ExportError
from tinycats_core.generator.onnx_file import ALONE, DENOISER, GRAPH, OUTPUT, require_self_contained
from tinycats_core.generator.samplers import Evaluation, plan_of
from tinycats_core.records import OnnxModel
from tinycats_core.release.tables import Tables

if TYPE_CHECKING:
    import onnx

ALL = 2**31 - 1  # an end of a slice beyond every batch
KEPT = ("image_size", "classes", "null_class", "source_sha256")  # of the denoiser's metadata


def compose(model: OnnxModel, config: SampleConfig) -> "onnx.ModelProto":
    """Return the graph of a denoiser file: noise (B, 3, S, S) f32, labels (B,) int64, guidance () f32 to images, uint8.

    Sampler, steps, shift and guidance interval are those of the settings. Its metadata says what it draws, by which settings,
    and of which weights and denoiser file it was made. If what the denoiser computes for one image depends on the others of a
    batch, the graph draws them one by one.

    Raises:
        ExportError: the file is missing, damaged, or not a denoiser of this project.
    """
    import onnx

    facts = require_self_contained(model.path)
    if facts.get("format") != DENOISER:
        raise ExportError(f"{model.path} is not a denoiser of this project: its metadata has no format {DENOISER}. Export again.")
    return build(onnx.load(model.path), model.sha256, config)


def build(
    denoiser: "onnx.ModelProto", denoiser_sha256: str, config: SampleConfig, tables: Tables | None = None
) -> "onnx.ModelProto":
    """Return the graph of a denoiser.

    Args:
        denoiser_sha256: of the file that it was made of.
        tables: further inputs of the denoiser, for each evaluation of the sampler and each class.
    """
    from onnx import TensorProto, helper

    facts = {entry.key: entry.value for entry in denoiser.metadata_props}
    shape = [dim.dim_value for dim in denoiser.graph.input[0].type.tensor_type.shape.dim[1:]]
    nodes = _Nodes()
    nodes.add("Not", [nodes.add("Equal", ["guidance", nodes.value("one", np.float32(1))], "unguided")], "guided")
    nodes.add("Cast", ["guided"], "factor", to=TensorProto.INT64)
    network = _Network(denoiser.graph, plan_of(config), config.guidance_interval, int(facts["null_class"]), tables or {})
    if ALONE in facts:
        _one_by_one(nodes, network, shape)
    else:
        nodes.add("Shape", ["labels"], "rows")
        nodes.add("Split", ["noise", "rows"], "begin")  # into one part, which fails if there is not one noise for each label
        _draw(nodes, network, "labels", shape, "images")
    typed, pixels = helper.make_tensor_value_info, ("batch", *shape)
    inputs = [("noise", TensorProto.FLOAT, pixels), ("labels", TensorProto.INT64, ["batch"]), ("guidance", TensorProto.FLOAT, [])]
    outputs = [typed("images", TensorProto.UINT8, pixels)]
    graph = helper.make_graph(nodes.nodes, "tinycats", [typed(*item) for item in inputs], outputs, nodes.constants)
    made = helper.make_model(graph, opset_imports=denoiser.opset_import, ir_version=denoiser.ir_version)
    kept = {name: facts[name] for name in KEPT}
    sampling = json.dumps(config.model_dump(mode="json"))
    helper.set_model_props(made, {"format": GRAPH, **kept, "denoiser_sha256": denoiser_sha256, "sampling": sampling})
    return made


@dataclass(frozen=True)
class _Network:
    """The denoiser, and how it is called."""

    graph: "onnx.GraphProto"
    plan: Sequence[Evaluation]
    interval: tuple[float, float]  # of t, where guidance is applied
    null: int
    tables: Tables


class _Nodes:
    """The nodes and constants of one graph; each node is named by what it gives."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def value(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _one_by_one(nodes: _Nodes, network: _Network, shape: Sequence[int]) -> None:
    """Add a loop over the images, each of which is drawn as a batch of one."""
    from onnx import TensorProto, helper

    body = _Nodes()
    body.value("front", np.array([0], np.int64))
    body.add("Unsqueeze", ["one_noise", "front"], "begin")
    body.add("Unsqueeze", ["one_label", "front"], "label")
    body.value("rows", np.array([1], np.int64))
    _draw(body, network, "label", shape, "drawn")
    body.add("Squeeze", ["drawn", "front"], "one_image")
    typed = helper.make_tensor_value_info
    inputs = [typed("one_noise", TensorProto.FLOAT, shape), typed("one_label", TensorProto.INT64, [])]
    graph = helper.make_graph(body.nodes, "one", inputs, [typed("one_image", TensorProto.UINT8, shape)], body.constants)
    nodes.add("Scan", ["noise", "labels"], "images", num_scan_inputs=2, body=graph)


def _draw(nodes: _Nodes, network: _Network, labels: str, shape: Sequence[int], images: str) -> None:
    """Add the way from `begin`, as many noises as `rows` says, to finished images."""
    nodes.add("Mul", ["rows", "factor"], "free")  # rows without a class
    _to_uint8(nodes, _loop(nodes, network, labels, ("now", *shape)), images)


def _loop(nodes: _Nodes, network: _Network, labels: str, pixels: Sequence[int | str]) -> str:
    """Add the loop over the evaluations of a plan, and return the name of the images that it ends with.

    It carries what `samplers.integrate` does: the images, where the next moves start, and the velocities before.
    """
    from onnx import TensorProto, helper

    plan = network.plan
    memory = max(len(evaluation.weights) for evaluation in plan)
    carried = ["x", "start", *(f"v{k}" for k in range(memory))]
    body = _Nodes()
    body.value("first", np.array([0], np.int64))
    at = body.add("Unsqueeze", ["number", "first"], "at")
    v = _guided(body, network, labels, at)
    x = _move(body, plan, memory, v, at)
    lands = body.add("Gather", [body.value("lands", np.array([row.lands for row in plan])), "number"], "landed")
    start = body.add("Where", [lands, x, "start"], "start_next")
    ends = [x, start, *[body.add("Identity", [name], f"{name}_kept") for name in [v, *carried[2:]][:memory]]]
    typed = helper.make_tensor_value_info
    counter, go = typed("number", TensorProto.INT64, []), typed("go", TensorProto.BOOL, [])
    inputs = [counter, go, *(typed(name, TensorProto.FLOAT, pixels) for name in carried)]
    outputs = [typed(body.add("Identity", ["go"], "go_on"), TensorProto.BOOL, [])]
    outputs += [typed(name, TensorProto.FLOAT, pixels) for name in ends]
    graph = helper.make_graph(body.nodes, "evaluation", inputs, outputs, body.constants)
    count, always = nodes.value("count", np.int64(len(plan))), nodes.value("always", np.bool_(True))
    begins = ["begin"] * len(carried)  # the first velocities before are of no weight, and any number will do
    names = [f"{name}_end" for name in carried]
    nodes.nodes.append(helper.make_node("Loop", [count, always, *begins], names, "evaluations", body=graph))
    return names[0]


def _guided(body: _Nodes, network: _Network, labels: str, at: str) -> str:
    """Add `sampling.guide`: one pass over the images, followed by a second copy of them where there is guidance."""
    plan, (low, high) = network.plan, network.interval
    inside = body.value("inside", np.array([low <= row.t <= high for row in plan], np.int64))
    free = body.add("Mul", ["free", body.add("Gather", [inside, at], "is_inside")], "free_now")
    again = body.add("Slice", ["x", "first", free, "first"], "x_again")
    nulls = body.add("Expand", [body.value("null", np.array([network.null], np.int64)), free], "nulls")
    time = body.add("Gather", [body.value("times", np.array([row.t for row in plan], np.float32)), at], "time")
    given = {
        "x": body.add("Concat", ["x", again], "x_both", axis=0),
        "t": body.add("Expand", [time, body.add("Add", ["rows", free], "rows_both")], "t_both"),
        "labels": body.add("Concat", [labels, nulls], "labels_both", axis=0),
    }
    both = _velocity(body, network, given | _looked_up(body, network, at))
    last = body.value("last", np.array([ALL], np.int64))
    labelled = body.add("Slice", [both, "first", "rows", "first"], "v_class")
    without = body.add("Slice", [both, body.add("Neg", ["rows"], "from_end"), last, "first"], "v_null")  # without guidance the same
    difference = body.add("Sub", [labelled, without], "v_difference")
    return body.add("Add", [without, body.add("Mul", ["guidance", difference], "v_further")], "v")


def _looked_up(body: _Nodes, network: _Network, at: str) -> dict[str, str]:
    """Add the look-up of each table's rows, of this evaluation and the classes, and return the name of each by its input."""
    from onnx import TensorProto

    if not network.tables:
        return {}
    width = body.value("classes", np.array([network.null + 1], np.int64))
    row = body.add("Add", [body.add("Mul", [at, width], "row_first"), "labels_both"], "row")
    found = {}
    for number, (name, table) in enumerate(network.tables.items()):
        values = body.add("Gather", [body.value(f"table{number}", table), row], f"looked_up{number}", axis=0)
        found[name] = values
        if table.dtype != np.float32:
            found[name] = body.add("Cast", [values], f"widened{number}", to=TensorProto.FLOAT)
    return found


def _velocity(body: _Nodes, network: _Network, given: Mapping[str, str]) -> str:
    """Add the nodes and weights of the denoiser, with other names for its inputs, and return the name of its velocity."""
    body.constants += network.graph.initializer
    weights = {"", *(item.name for item in network.graph.initializer)}  # an empty name is an input that is left out

    def renamed(name: str) -> str:
        return name if name in weights else given.get(name, f"denoiser/{name}")

    for source in network.graph.node:
        node = type(source)()
        node.CopyFrom(source)
        node.name = f"denoiser/{source.name}"
        node.input[:], node.output[:] = map(renamed, source.input), map(renamed, source.output)
        body.nodes.append(node)
    return renamed(OUTPUT)


def _move(body: _Nodes, plan: Sequence[Evaluation], memory: int, v: str, at: str) -> str:
    """Add one move of `samplers.integrate`, and return the name of the images that it leads to."""
    slope = v
    for k in range(memory):
        weights = [row.weights[k] if k < min(len(row.weights), i) else 0 for i, row in enumerate(plan)]
        weight = body.add("Gather", [body.value(f"weights{k}", np.array(weights, np.float32)), at], f"weight{k}")
        change = body.add("Mul", [weight, body.add("Sub", [v, f"v{k}"], f"change{k}")], f"bend{k}")
        slope = body.add("Add", [slope, change], f"slope{k}")
    step = body.add("Gather", [body.value("steps", np.array([row.step for row in plan], np.float32)), at], "step")
    return body.add("Add", ["start", body.add("Mul", [step, slope], "way")], "x_next")


def _to_uint8(nodes: _Nodes, end: str, images: str) -> None:
    """Add `sampling.to_uint8`."""
    from onnx import TensorProto

    half, low, high = (nodes.value(name, np.float32(value)) for name, value in {"half": 127.5, "low": 0, "high": 255}.items())
    scaled = nodes.add("Mul", [nodes.add("Add", [end, "one"], "positive"), half], "scaled")
    clipped = nodes.add("Clip", [nodes.add("Round", [scaled], "rounded"), low, high], "clipped")
    nodes.add("Cast", [clipped], images, to=TensorProto.UINT8)
