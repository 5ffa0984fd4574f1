"""The calls whose results are recorded: every recipe at two bit-widths, and every way to say what the bits are."""

import warnings
from collections.abc import Callable
from dataclasses import replace

from torch import nn

import calque
import networks
from calque.errors import CaptureWarning
from calque.grid.bits import Bits
from calque.recipe import RECIPES, AdaQuant, Blocks, Parallel, Recipe
from text_networks import FREE, Encoder, sentences, trained_encoder

IMAGES = 96
BITS = ("w8a8", "w2a4")


def short(name: str) -> Recipe:
    """The shipped recipe with fewer steps, and none that a clock bounds."""
    recipe = RECIPES[name]
    if isinstance(recipe.fit, AdaQuant):
        recipe = replace(recipe, fit=replace(recipe.fit, steps=20))
    if isinstance(recipe.search.fit, AdaQuant):
        recipe = replace(recipe, search=replace(recipe.search, fit=replace(recipe.search.fit, steps=10)))
    if recipe.distillation is not None:
        recipe = replace(recipe, distillation=replace(recipe.distillation, minutes=0, steps=6))
    if recipe.tuning is not None:
        recipe = replace(recipe, tuning=replace(recipe.tuning, steps=5))
    return recipe


def images(**options: object) -> Callable[[], nn.Module]:
    """A call on a trained convolutional network with a shortcut and batch norms."""
    inputs, _ = networks.stripes(IMAGES, seed=3)
    return lambda: calque.quantize(networks.trained(), inputs, **options)  # type: ignore[arg-type]


def text(**options: object) -> Callable[[], nn.Module]:
    """A call on a trained encoder with masks, attention products and outlier channels."""

    def call() -> nn.Module:
        model: Encoder = trained_encoder(steps=60)
        return calque.quantize(model, sentences(IMAGES, seed=1000), dynamic=FREE, **options)  # type: ignore[arg-type]

    return call


def parts() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        return calque.quantize(networks.seeded(networks.Branching()), networks.images(160, seed=1), bits="w4a4")


def plan() -> nn.Module:
    inputs, _ = networks.stripes(IMAGES, seed=3)
    bits = {"stem": "w8a8", "conv1": "w3a4", "conv2": "w4a8", "down": "w2a4", "head": "w8a8"}
    chosen = calque.Plan({name: Bits.parse(text) for name, text in bits.items()})
    return calque.quantize(networks.trained(), inputs, plan=chosen)


def cases() -> dict[str, Callable[[], nn.Module]]:
    """Every recorded call by its name."""
    candidates = ("w8a8", "w4a4", "w2a4")
    parallel = replace(short("sequential"), name="parallel", flavour=Parallel())
    blocks = replace(short("sequential"), name="blocks", blocks=Blocks(steps=10))
    found = {f"{name} {bits}": images(bits=bits, recipe=short(name)) for name in RECIPES for bits in BITS}
    found |= {
        "parallel w4a4": images(bits="w4a4", recipe=parallel),
        "blocks w4a4": images(bits="w4a4", recipe=blocks),
        "inputs w4a4": images(bits="w4a4", placement="inputs"),
        "override": images(bits="w4a4", override={"conv1": "w8a8", "down": None}),
        "weights alone": images(bits="w4"),
        "plan": plan,
        "parts": parts,
        "budget, fast": images(bits=candidates, budget=calque.Budget(bops=0.04)),
        "budget, advanced": images(bits=candidates, budget=calque.Budget(bops=0.05), recipe=short("advanced")),
        "budget of a loss": images(bits=candidates, budget=calque.Budget(loss=0.01, minimize="size"), recipe="light"),
        "text w8a8": text(bits="w8a8"),
        "text w4a4": text(bits="w4a4", placement="inputs"),
        "text w4g16": text(bits="w4g16"),
        "text, sequential": text(bits="w4a8", recipe=short("sequential")),
    }
    return found
