"""TinyDiT, flow matching, training, judging and releasing of small cat generators. Imports nothing heavy."""

from tinycats_core.threads import bound_spin

__version__ = "0.1.0"

bound_spin()  # here, before any module of the package imports PyTorch
