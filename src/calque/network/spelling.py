"""How paths of the user's modules are spelled in a captured graph, where code that torch writes cannot spell them."""

import keyword
import unicodedata
from collections.abc import Iterator, Mapping

from torch import fx, nn
from torch.export import ExportedProgram

_ROOT = fx.GraphModule(nn.Module(), fx.Graph())  # at its root, attributes of graphs (graph, code) are taken
_TAKEN = ("self", "_in_spec", "_out_spec")


def respellings(model: nn.Module) -> dict[str, str]:
    """Path -> its spelling, for paths of modules, parameters and buffers that are spelled otherwise.

    Quotes, backslashes and what cannot be printed become underscores; a keyword, an attribute of graphs and a name that its
    neighbour has already get one more: heads.class is heads.class_ then, graph is graph_.
    """
    children: dict[str, dict[str, None]] = {}
    for path in _paths(model):
        owner, _, leaf = path.rpartition(".")
        children.setdefault(owner, {})[leaf] = None
    spelled: dict[str, str] = {"": ""}
    for owner, names in children.items():  # owners come before what is in them
        free = {name for name in names if _spell(name, root=not owner) == name}
        for name in names:
            own = _spell(name, root=not owner)
            while own != name and own in free:
                own += "_"
            free.add(own)
            spelled[_joined(owner, name)] = _joined(spelled[owner], own)
    return {path: own for path, own in spelled.items() if path != own}


def spelling_notes(model: nn.Module) -> list[str]:
    """A sentence for each module or tensor whose own name is another one in plans, reports and files."""
    return [
        f"{ascii(path)[1:-1]} is called {own} in plans and reports: code cannot spell it."
        for path, own in respellings(model).items()
        if path.rpartition(".")[2] != own.rpartition(".")[2]
    ]


def respell(program: ExportedProgram, spelled: Mapping[str, str]) -> None:
    """Renames, in place, what a program read from the model and where its operators stand."""
    if not spelled:
        return
    for tensors in (program.state_dict, program.constants):
        renamed = {spelled.get(name, name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
    for entry in program.graph_signature.input_specs:
        if entry.target is not None:
            entry.target = spelled.get(entry.target, entry.target)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (spelled.get(path, path), kind) for key, (path, kind) in stack.items()}


def _paths(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            yield path
        for name in (*module._parameters, *module._buffers):
            yield _joined(path, name)


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _spell(name: str, *, root: bool) -> str:
    """The name, or one that code can spell."""
    plain = "".join(letter if letter.isprintable() and letter not in '"\\' else "_" for letter in name)
    if plain.isidentifier():
        plain = unicodedata.normalize("NFKC", plain)  # as Python reads identifiers
    if keyword.iskeyword(plain) or (root and (hasattr(_ROOT, plain) or plain in _TAKEN)):
        return f"{plain}_"
    return plain or "_"
