"""What becomes of one network at given bits: the pieces of a recipe that every network of a run goes through."""

from dataclasses import dataclass, replace

from calque.recipe import Recipe
from calque.settings import Blocks, ClosedForm, Flavour, Method, Nearest, Normalization, Parallel, Ranges, Sequential


@dataclass(frozen=True, slots=True)
class Stages:
    """One network's stages.

    Attributes:
        ranges, fit, flavour, blocks, normalization: see `Recipe`.
        shortcuts: whether a layer in front of a residual add makes up for what the shortcut has lost; the closed forms gain
            by it (docs/experiments.md).
    """

    ranges: Ranges
    fit: Method
    flavour: Flavour
    shortcuts: bool
    blocks: Blocks | None = None
    normalization: Normalization | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Stages":
        """Those of a network that may be the result."""
        shortcuts = isinstance(recipe.fit, ClosedForm)
        return cls(recipe.ranges, recipe.fit, recipe.flavour, shortcuts, recipe.blocks, recipe.normalization)

    def base(self) -> "Stages":
        """Those of the network in which candidates are priced: its weights are rounded to nearest, and its channels are the
        float network's own, to which the candidates are fitted.
        """
        flavour = self.flavour if isinstance(self.flavour, Parallel) else Sequential()
        return replace(self, fit=Nearest(), flavour=flavour, blocks=None, normalization=None)

    @property
    def channel_scales(self) -> float:
        """The exponent of channel scales; layers that see the float network have none."""
        return self.flavour.channel_scales if isinstance(self.flavour, Sequential) else 0.0
