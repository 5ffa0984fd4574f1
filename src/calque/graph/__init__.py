"""The network as torch.export sees it: operators in order, weighted layers under the user's names."""

from calque.graph.capture import capture
from calque.graph.layers import Geometry, WeightedLayer
from calque.graph.network import Layer, Network
from calque.graph.signature import Batch, Signature
from calque.graph.trace import DynamicAxes

__all__ = ["Batch", "DynamicAxes", "Geometry", "Layer", "Network", "Signature", "WeightedLayer", "capture"]
