"""Models in the formats of other libraries, with integers in place of float weights."""

from diffq.export.model import onnx as onnx
