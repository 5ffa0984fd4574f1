"""What the inputs, the outputs and the constants of a file are called: as in the network, whatever torch.onnx called them."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from calque.errors import ExportError, SpecError
from calque.network import paths as tree_paths
from calque.network.compat import children
from calque.network.network import value_of
from calque.quantized.model import QuantizedModel
from calque.run.fields import shown

WEIGHTS = "module."  # in front of the network's own tensors, where torch.onnx has them


@dataclass(frozen=True, slots=True)
class Interface:
    """The names of a file's inputs and outputs, in their order; all are distinct.

    Attributes:
        inputs_chosen, outputs_chosen: whether they are the user's, which must not be changed.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs_chosen: bool = False
    outputs_chosen: bool = False

    def beside(self, taken: Container[str]) -> "Interface":
        """The same names, with underscores behind those of the network that are `taken`, or used twice.

        Raises:
            SpecError: a chosen one is taken.
        """
        used = {*(self.inputs if self.inputs_chosen else ()), *(self.outputs if self.outputs_chosen else ())}
        for name in sorted(used):
            if name in taken:
                raise SpecError(
                    f"{name!r} is the name of a tensor inside the file. Choose another input or output name."
                )
        inputs = self.inputs if self.inputs_chosen else tuple(free_name(name, used, taken) for name in self.inputs)
        outputs = self.outputs if self.outputs_chosen else tuple(free_name(name, used, taken) for name in self.outputs)
        return replace(self, inputs=inputs, outputs=outputs)


def interface(
    model: QuantizedModel, input_names: Sequence[str] | None = None, output_names: Sequence[str] | None = None
) -> Interface:
    """The names that were chosen; else forward's arguments, and the keys and fields of what it returns.

    Raises:
        SpecError: names that are no list of distinct, non-empty strings, one for each.
    """
    own = Interface(tuple(_argument_names(model)), tuple(_result_names(model)))
    inputs = own.beside(()).inputs if input_names is None else _checked("input", input_names, own.inputs)
    outputs = own.outputs if output_names is None else _checked("output", output_names, own.outputs)
    twice = next((name for name in outputs if name in inputs), None)
    if twice is not None and output_names is not None:
        raise SpecError(
            f"output_names must differ from the names of the inputs ({', '.join(inputs)}). Got {shown(twice)}."
        )
    return Interface(inputs, outputs, input_names is not None, output_names is not None).beside(())


def _argument_names(model: QuantizedModel) -> list[str]:
    """The flat inputs by forward's arguments, their keys and positions: image, boxes_0, features_p3."""
    return [tree_paths.joined(path) for path in tree_paths.leaf_paths(children(model.in_spec)[1])]


def _result_names(model: QuantizedModel) -> list[str]:
    """The outputs that are tensors by their keys, fields and positions; those without a key or field begin with "output"."""
    (output,) = model.graph_module.graph.find_nodes(op="output")
    leaves = zip(tree_paths.leaf_paths(model.out_spec), output.args[0], strict=True)
    paths = [path for path, leaf in leaves if value_of(leaf) is not None]
    return tree_paths.output_names(paths)


def _checked(kind: str, given: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """The names that were given."""
    rule = f"{kind}_names is a list with one distinct name for each {kind} ({', '.join(present)})"
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise SpecError(f"{rule}. Got {shown(given)}.")
    if len(given) != len(present):
        raise SpecError(f"{rule}. Got {len(given)}: {', '.join(given) or 'none'}.")
    if len(set(given)) < len(given) or not all(name.strip() for name in given):
        raise SpecError(f"{rule}, none of them empty. Got {', '.join(map(repr, given))}.")
    return tuple(given)


def name_values(graph: onnx.GraphProto, names: Interface) -> None:
    """Names the inputs and outputs, and the tensors that stay float, in place; nothing else inside has their names.

    Raises:
        ExportError: a graph with another number of inputs or outputs.
        SpecError: a chosen name is that of a tensor of a quantizer or layer.
    """
    if (len(graph.input), len(graph.output)) != (len(names.inputs), len(names.outputs)):
        raise ExportError(
            f"the quantized network has {len(names.inputs)} inputs and {len(names.outputs)} outputs, this one has "
            f"{len(graph.input)} and {len(graph.output)}. Pass the float network that it was made from."
        )
    _separate_outputs(graph)
    inner = list(dict.fromkeys(_inner_names(graph)))
    looked_up = {name for name in inner if "/" in name}  # such as the codes of an edge, and a layer's scale
    names = names.beside(looked_up)
    fronts = (value.name for value in (*graph.input, *graph.output))
    renamed = dict(zip(fronts, names.inputs + names.outputs, strict=True))
    used = set(renamed.values())
    for name in inner:
        if name not in renamed:
            renamed[name] = free_name(name.removeprefix(WEIGHTS), used)
    rename(graph, renamed)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those of the branches and loops in it, where their node stands."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def _separate_outputs(graph: onnx.GraphProto) -> None:
    """Gives outputs a value of their own where an input, a constant or an earlier output is returned."""
    shared = {value.name for value in (*graph.input, *graph.initializer)}
    known = {*shared, *_inner_names(graph)}
    for output in graph.output:
        if output.name in shared:
            copied = free_name(output.name, known)
            graph.node.append(helper.make_node("Identity", [output.name], [copied]))
            output.name = copied
        shared.add(output.name)


def _inner_names(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of constants and computed values, with repetitions; in branches and loops also of what they are given."""
    for each in graphs(graph):
        yield from (tensor.name for tensor in each.initializer)
        yield from (name for node in each.node for name in node.output if name)
        if each is not graph:
            yield from (value.name for value in each.input)


def rename(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Gives values other names, in place, in branches and loops, too."""
    for each in graphs(graph):
        for node in each.node:
            for values in (node.input, node.output):
                values[:] = [renamed.get(name, name) for name in values]
        for value in (*each.input, *each.output, *each.initializer, *each.value_info):
            value.name = renamed.get(value.name, value.name)


def free_name(name: str, used: set[str], taken: Container[str] = ()) -> str:
    """The name, underscores behind it where it is used or taken; it is used from now on."""
    while name in used or name in taken:
        name += "_"
    used.add(name)
    return name
