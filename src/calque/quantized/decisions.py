"""Which bits every layer has, or may have: what the user asked for, checked against the network."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from calque.errors import SpecError
from calque.grid.bits import FLOAT, Bits, Plan, apply_overrides, check_entry
from calque.network import Network
from calque.network.heads import heads
from calque.network.tensors import named_tensors

DEFAULT_BITS = "w8a8"


def decide_bits(
    network: Network,
    *,
    bits: str | None,
    plan: Plan | None,
    override: Mapping[str, str | None] | None,
    first_last: str | None,
) -> dict[str, Bits]:
    """Bits of every layer by name, and of the tensors that a plan or an override names.

    Raises:
        SpecError: both bits and a plan; a plan that lacks a layer or has a name that the network does not have; see also
            `apply_overrides`.
    """
    names = list(network.layers)
    tensors = named_tensors(network)
    if plan is not None:
        if bits is not None:
            raise SpecError("bits and plan exclude each other: a plan has the bits of every layer. Drop one of them.")
        missing, unknown = (
            [n for n in names if n not in plan],
            [n for n in plan if n not in (*names, *tensors)],
        )
        if missing or unknown:
            raise SpecError(f"the plan must name the network's layers. Missing: {missing}; unknown: {unknown}.")
        entries = {name: check_entry(name, plan[name], is_layer=name in names) for name in plan}
        ends = None if first_last == "auto" else first_last
    else:
        parsed = Bits.parse(DEFAULT_BITS if bits is None else bits)
        check_entry("bits", parsed, is_layer=True)
        entries = dict.fromkeys(names, parsed)
        automatic = "w8" if parsed.activation is None else "w8a8"
        ends = (None if parsed == FLOAT else automatic) if first_last == "auto" else first_last
    if ends is not None:
        both = check_entry("first_last", Bits.parse(ends), is_layer=True)
        entries.update(dict.fromkeys(_ends(network), both))
    decided = apply_overrides(entries, override or {}, tensors)
    return {name: _suited(network, name, bits) if name in network.layers else bits for name, bits in decided.items()}


def decide_choices(
    network: Network,
    *,
    bits: Sequence[str],
    override: Mapping[str, str | None] | None,
    first_last: str | None,
) -> tuple[dict[str, tuple[Bits, ...]], dict[str, Bits]]:
    """The bits that each layer may have under a budget; and those of tensors that an override names.

    The ends are choices like any other unless `first_last` gives their bits ("auto" does not).

    Raises:
        SpecError: bits that are no choice of a layer; see also `apply_overrides`.
    """
    if not bits:
        raise SpecError("a budget needs at least one candidate of bits. Got none.")
    candidates = tuple(dict.fromkeys(check_entry("bits", Bits.parse(text), is_layer=True) for text in bits))
    names = list(network.layers)
    fixed: dict[str, Bits] = {}
    if first_last not in ("auto", None):
        ends = check_entry("first_last", Bits.parse(first_last), is_layer=True)
        fixed |= dict.fromkeys(_ends(network), ends)
    tensors = named_tensors(network)
    undecided = dict.fromkeys(names, candidates[0])
    asked = override or {}
    overridden = apply_overrides(undecided, asked, tensors)
    for_layers = [pattern for pattern, text in asked.items() if _suits_layers(text)]
    touched = {name for name in names if any(fnmatchcase(name, pattern) for pattern in for_layers)}
    choices = {
        name: (overridden[name],) if name in touched else (fixed[name],) if name in fixed else candidates
        for name in names
    }
    for name in names:
        choices[name] = tuple(dict.fromkeys(_suited(network, name, option) for option in choices[name]))
    return choices, {name: entry for name, entry in overridden.items() if name not in undecided}


def asked_layers(network: Network, plan: Plan | None, override: Mapping[str, str | None]) -> set[str]:
    """The layers whose bits the user gave one by one: those of a plan, and those that an override names."""
    if plan is not None:
        return set(network.layers)
    patterns = [pattern for pattern, text in override.items() if _suits_layers(text)]
    return {name for name in network.layers if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _ends(network: Network) -> tuple[str, ...]:
    """The first and the last layer that multiply, and every head of a network with several outputs; tables are no ends."""
    names = [name for name in network.layers if not network.is_table(name)]
    return (names[0], names[-1], *heads(network)) if names else ()


def _suited(network: Network, name: str, bits: Bits) -> Bits:
    """What these bits are for that layer.

    Without activations for embeddings: what they read are numbers of rows. Without groups for all but linear layers whose
    inputs are whole groups; a layer that shares the codes of a table has the table's scales.
    """
    layer = network.weighted(name)
    if network.is_table(name):
        return Bits(bits.weight, None)
    linear = layer.geometry.kind == "linear" and not network.is_table(network.shared.get(name, name))
    if bits.group is None or (linear and layer.weight.shape[1] % bits.group == 0):
        return bits
    return Bits(bits.weight, bits.activation)


def _suits_layers(text: str | None) -> bool:
    """Whether an override's bits are a layer's; those of activations alone are for tensors."""
    bits = FLOAT if text is None else Bits.parse(text)
    return bits == FLOAT or bits.weight is not None
