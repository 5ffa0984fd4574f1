"""The network as torch.export sees it: operators in order, weighted layers under the user's names."""

from calque.graph.capture import DynamicAxes, capture
from calque.graph.layers import Geometry, WeightedLayer
from calque.graph.network import Layer, Network
from calque.graph.signature import Batch, Signature

__all__ = ["Batch", "DynamicAxes", "Geometry", "Layer", "Network", "Signature", "WeightedLayer", "capture"]
