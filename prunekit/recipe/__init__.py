"""What a recipe says: the YAML schema, the only room that knows it."""

from prunekit.recipe.building import optimizer_of, scheduler_of
from prunekit.recipe.layerwise import Layerwise
from prunekit.recipe.prune_options import applied_steps, prune_section
from prunekit.recipe.pruning import DROPS, SIZED, TIMES, CompareRefine, Prune, Refine, Refinement, Steps
from prunekit.recipe.recipe import RESOLVED, Recipe
from prunekit.recipe.sections import Data, Record, Watch
from prunekit.recipe.study import BY_LAYERS, Study
from prunekit.recipe.training import Finetune, Optimizer, RateSchedule
from prunekit.recipe.values import check_device, parse_seconds
from prunekit.recipe.yaml_file import read_yaml, to_yaml

__all__ = [
    "BY_LAYERS", "DROPS", "RESOLVED", "SIZED", "TIMES", "CompareRefine", "Data", "Finetune", "Layerwise", "Optimizer", "Prune",
    "RateSchedule", "Recipe", "Record", "Refine", "Refinement", "Steps", "Study", "Watch", "applied_steps", "check_device",
    "optimizer_of", "parse_seconds", "prune_section", "read_yaml", "scheduler_of", "to_yaml",
]  # fmt: skip
