"""Names of layers, none of which is the path to another."""

from collections.abc import Mapping

from calque.network.layers import Geometry


def beside_inner(layers: Mapping[str, Geometry], modules: set[str]) -> dict[str, str]:
    """Other names for layers whose module has layers inside: its path and the operator, so that no name is a part of another."""
    renamed = {}
    for name, geometry in layers.items():
        path, mark, call = name.partition("#")
        if any(inner.startswith(f"{path}.") for inner in layers):
            own = f"{path}.{'conv2d' if geometry.kind == 'convolution' else geometry.kind}"
            while own in modules:
                own += "_"
            renamed[name] = f"{own}{mark}{call}"
    return renamed
