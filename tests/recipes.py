"""Shipped recipes that end soon."""

from dataclasses import replace

from calque.recipe import AdaQuant, Recipe


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with at most that many steps of every descent, and none that a clock bounds."""
    if isinstance(recipe.fit, AdaQuant):
        recipe = replace(recipe, fit=replace(recipe.fit, steps=min(steps, recipe.fit.steps)))
    if isinstance(recipe.search.fit, AdaQuant):
        fit = replace(recipe.search.fit, steps=min(steps, recipe.search.fit.steps))
        recipe = replace(recipe, search=replace(recipe.search, fit=fit))
    if recipe.distillation is not None:
        recipe = replace(recipe, distillation=replace(recipe.distillation, minutes=0, steps=steps))
    if recipe.tuning is not None:
        recipe = replace(recipe, tuning=replace(recipe.tuning, steps=min(steps, recipe.tuning.steps)))
    return recipe
