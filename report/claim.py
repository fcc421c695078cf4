"""A run held against what its recipe claims, where the claim is about such a run."""

from common.text import counted
from config import TrainConfig
from models.recipes import RECIPES
from training.data import Data

FAR, FAR_ELSEWHERE = 0.01, 0.02  # of what was measured with this program, and of what others say


def told_claim(name: str) -> str:
    """What the start panel says of a recipe."""
    recipe = RECIPES[name]
    lacks = f"; lacks {recipe.lacks}" if recipe.lacks else ""
    return f"{name}: {recipe.summary}; claimed: {recipe.claim}{lacks}"


def far_from_claim(config: TrainConfig, data: Data, results: dict) -> str:
    """A sentence where a whole run came to another accuracy than its recipe claims; else "".

    Nothing where the claim is not about it: other data or settings, a part of the images.
    """
    recipe = RECIPES.get(config.recipe)
    if recipe is None or recipe.accuracy is None or recipe.metric not in results:
        return ""
    same = all(getattr(config, name) == value for name, value in recipe.settings.items())
    images = (len(data.train), len(data.test), len(data.classes))
    if not same or config.max_steps or images != recipe.on:
        return ""
    off = results[recipe.metric] - recipe.accuracy
    if abs(off) <= max(4 * recipe.sd, FAR if recipe.ran else FAR_ELSEWHERE):
        return ""
    found = f"{100 * results[recipe.metric]:.2f} % of {counted(images[1], 'test image')}"
    reason = f"; it lacks {recipe.lacks}" if recipe.lacks and off < 0 else ""
    return (
        f"far from what the recipe {config.recipe} claims: {found}, {100 * abs(off):.1f} points "
        f"{'less' if off < 0 else 'more'} than {recipe.claim} ({recipe.source}){reason}"
    )
