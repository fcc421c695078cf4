"""Every setting: fields, layers and their origins, command line and YAML, batch plan; no torch."""

import common.parent  # noqa: F401 - remembers the launcher before torch is imported
from config.batch import BatchPlan, plan_batch
from config.command_line import (
    build_parser,
    has_own_terminal,
    host_name,
    parse,
    parse_or_exit,
    parse_to_train,
    several_nodes,
    tell,
)
from config.fields import HINTS, MAY_CHANGE, TYPES, TrainConfig, flag_of, mean_and_std, unfreezing
from config.layers import Actions, Settings, own_disks, recipe_of, restarted, task_of, to_json

__all__ = [
    "HINTS", "MAY_CHANGE", "TYPES", "Actions", "BatchPlan", "Settings", "TrainConfig",
    "build_parser", "flag_of", "has_own_terminal", "host_name", "mean_and_std", "own_disks",
    "parse", "parse_or_exit", "parse_to_train", "plan_batch", "recipe_of", "restarted",
    "several_nodes", "task_of", "tell", "to_json", "unfreezing",
]  # fmt: skip
