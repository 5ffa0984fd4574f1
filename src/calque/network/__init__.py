"""The network as torch.export sees it: operators in order, weighted layers under the user's names."""

from calque.network.capture import capture
from calque.network.layers import Geometry, WeightedLayer
from calque.network.network import Layer, Network
from calque.network.signature import Batch, Signature
from calque.network.trace import DynamicAxes

__all__ = ["Batch", "DynamicAxes", "Geometry", "Layer", "Network", "Signature", "WeightedLayer", "capture"]
