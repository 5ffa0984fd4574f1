"""Where each leaf of a tree of arguments or outputs is, and its name: the keys, fields and positions on the way to it."""

from collections.abc import Sequence

from torch.utils import _pytree as pytree

from calque.network.compat import children
from calque.network.outputs import Record

Path = tuple[str | int, ...]  # keys and fields are strings, positions numbers

OUTPUT = "output"  # an output without a key or field


def leaf_paths(tree: pytree.TreeSpec) -> list[Path]:
    """The path of each leaf, in the order of the leaves.

    >>> leaf_paths(pytree.tree_structure({"boxes": [1, 2], "score": 3}))
    [('boxes', 0), ('boxes', 1), ('score',)]
    """
    if tree.is_leaf():
        return [()]
    steps = zip(_steps(tree), children(tree), strict=True)
    return [(step, *path) for step, child in steps for path in leaf_paths(child)]


def joined(path: Path) -> str:
    """The path as a name: features_p3, boxes_0. What is no Unicode is spelled by its number."""
    return "_".join(map(str, path)).encode("utf-8", "backslashreplace").decode()


def output_names(paths: Sequence[Path]) -> list[str]:
    """The names of outputs by their keys, fields and positions; those without a key or field begin with "output".

    >>> output_names([("boxes", 0), ("boxes", 1), ("score",)])
    ['boxes_0', 'boxes_1', 'score']
    >>> output_names([(0,), (1,)]), output_names([()])
    (['output_0', 'output_1'], ['output'])
    """
    while all(paths) and len({path[0] for path in paths}) == 1 and isinstance(paths[0][0], int):
        paths = [path[1:] for path in paths]  # a tuple of one
    return [joined(path) if path and isinstance(path[0], str) else joined((OUTPUT, *path)) for path in paths]


def _steps(tree: pytree.TreeSpec) -> Sequence[str | int]:
    """What each child is called in its parent: as the type's context says, else its position."""
    kind, context, count = tree.type, tree.context, tree.num_children
    if kind is Record:
        names: object = context[1]
    elif isinstance(context, type):  # of a named tuple
        names = getattr(context, "_fields", None)
    elif isinstance(context, list) and len(context) == 2 and isinstance(context[1], list):  # of a defaultdict
        names = context[1]
    else:  # the keys of dicts and of what transformers returns; torch's own results have their fields on the type
        names = getattr(kind, "__match_args__", None) if context is None else context
    if not isinstance(names, (list, tuple)) or len(names) != count:
        return range(count)
    return [name if type(name) in (str, int) else str(name) for name in names]
