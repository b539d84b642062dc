"""TinyDiT, flow matching, training, judging and releasing of small cat generators. Imports nothing heavy."""

__version__ = "0.1.0"
