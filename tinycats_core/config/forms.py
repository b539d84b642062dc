"""The forms in which `cats-*.onnx` may ship, one row each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """How the network is stored in a graph."""

    weights: Literal["fp32", "fp16", "int8"]
    what: str  # for the card
    opset: int | None = None  # None: export.opset
    table: bool = False  # the modulation as a table in place of its layers


FORMS = {
    "fp32": Form("fp32", "the weights as they were trained"),
    "int8": Form("int8", "int8 weights and activations"),
    "fp16": Form("fp16", "weights in half precision; the arithmetic is fp32"),
    "fp32-opset23": Form("fp32", "attention and RMS norm as operators of opset 23", 23),
    "int8-opset23": Form("int8", "int8 weights and activations, with the operators of opset 23", 23),
    "int8-table": Form("int8", "the same, and the modulation as a table", 23, table=True),
}
ALWAYS = ("fp32", "int8")  # ship with a denoiser file of the same form; the others ship if they are chosen
OTHERS = tuple(name for name in FORMS if name not in ALWAYS)
