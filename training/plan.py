"""What a run is going to do: the world looked at once, by the main process, for all of them."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.disk import read_json
from common.errors import UserError
from common.text import class_name
from config import Actions, BatchPlan, Settings, TrainConfig, recipe_of, restarted
from data.sources import SOURCES, choose_dataset
from distributed.checkpoint import visible
from distributed.world import World
from models import card_of_weights, lookup
from models.weights import imagenet_reach
from training.run_dir import fresh_name


@dataclass(frozen=True)
class Plan:
    """Decided before anything is loaded; the same on every process.

    `folder` is None for trials that leave no run. `goes_on`: the folder holds a checkpoint or, for
    --eval-only, weights, so that none need to be found to start from. `shouts` are (title, text) of
    choices that were made because something is missing, `warnings` sentences.
    """

    settings: Settings
    config: TrainConfig
    folder: Path | None
    goes_on: bool
    shouts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def actions(self) -> Actions:
        return self.settings.actions

    @property
    def both_lengths(self) -> bool:
        """Whether --epochs and --max-steps were typed together: the first to come ends the run."""
        return {"epochs", "max_steps"} <= self.settings.typed.keys()

    def with_batch(self, batch: BatchPlan) -> "Plan":
        """The plan with the batch and the shards that the data and the processes allow."""
        decided = {"batch_size": batch.batch_size, "shards": str(batch.shards)}
        changed = {k: v for k, v in decided.items() if v != getattr(self.config, k)}
        settings = self.settings.with_layer("batch plan", changed)
        return replace(self, settings=settings, config=settings.config)


def classes_of_run(plan: Plan) -> tuple[str, ...]:
    """The classes by the numbers that the run to go on with gave them; () where none is there."""
    if not plan.goes_on or plan.config.run_dir is None:
        return ()
    folder = Path(plan.config.run_dir)
    known = card_of_weights(str(folder / "model.safetensors")).get("classes", ())
    if plan.actions.eval_only:
        return known
    kept = read_json(folder / "classes.json", {}).get("classes", known)
    return tuple(map(class_name, kept))


def leaves_no_run(actions: Actions) -> bool:
    """Whether this command ends without a run folder."""
    return actions.dry_run or actions.find_lr or actions.eval_only


def decide(world: World) -> Plan:
    """Choose data set, starting weights and run folder, once, on the main process."""
    settings = world.settings
    found = world.main_decides(lambda: _look(settings))
    settings = settings.with_layer("recipe", found["recipe"])
    for origin, values in found["layers"].items():
        settings = settings.with_layer(origin, values, before=found["before"])
    folder = None
    if not leaves_no_run(settings.actions):
        config, debug = settings.config, settings.actions.debug
        folder = world.main_decides(lambda: _choose_folder(config, debug))
        settings = settings.with_layer("run folder", {"run_dir": str(folder)})
    return Plan(
        settings, settings.config, folder, found["goes_on"], found["shouts"], found["warnings"]
    )


def _look(settings: Settings) -> dict:
    """Which data, which weights; what the user typed always wins."""
    config, layers = settings.config, {}
    shouts: list[tuple[str, str]] = []
    warnings = typed_in_vain(settings)
    goes_on = _has_weights(settings)
    entry = lookup(config.model)
    asked = config.dataset
    if asked == "auto" and entry.task == "regression":
        asked = "line"
    dataset, reason = choose_dataset(asked, config.data_dir)
    if config.dataset == "auto":
        if dataset == "digits":
            shouts.append(("training on digits, not on CIFAR-10", reason))
        layers["available"] = {"dataset": dataset}
    weights = config.weights
    if weights == "auto":
        weights = "none"
        if config.model == "alexnet" and entry.finetune:
            reached, reason = imagenet_reach(config.model)
            weights = "imagenet" if reached else "none"
            if not reached:
                warnings.append(f"starting from scratch: {reason}")
        layers.setdefault("available", {})["weights"] = weights
    elif weights == "imagenet" and not goes_on:
        reached, reason = imagenet_reach(config.model)
        if not reached:
            raise UserError(f"--weights imagenet: {reason}", code="weights-not-reached")
    if dataset in SOURCES and SOURCES[dataset].recipe:
        layers["data set"] = SOURCES[dataset].recipe
    before = next((o for o in ("saved run", "--debug") if o in settings.layers), "")
    before = before or next((o for o in settings.layers if o.startswith("file")), "flag")
    return {
        "layers": layers,
        "goes_on": goes_on,
        "recipe": recipe_of(config.model, weights),
        "before": before,
        "shouts": tuple(shouts),
        "warnings": tuple(warnings),
    }


def typed_in_vain(settings: Settings) -> list[str]:
    """What was typed and changes nothing."""
    config, actions, found = settings.config, settings.actions, []
    if config.lr == 0 and not actions.eval_only:
        found.append("--lr 0 changes no weight; --find-lr suggests a rate, --eval-only trains none")
    if actions.fresh and config.run_dir is None:
        found.append("no effect: --fresh; without --run-dir each run has a new folder anyway")
    return found


def _has_weights(settings: Settings) -> bool:
    """Whether the run folder holds what --weights would only begin with."""
    config, actions = settings.config, settings.actions
    if config.run_dir is None or starts_over(actions):
        return False
    folder = Path(config.run_dir)
    ended = (folder / "last.safetensors").is_file()
    return actions.eval_only or ended or bool(visible(folder / "checkpoints"))


def starts_over(actions: Actions) -> bool:
    """--fresh, as a person typed it: a launcher that restarts the command means to go on."""
    return actions.fresh and not restarted()


def _choose_folder(config: TrainConfig, debug: bool) -> Path:
    if config.run_dir is None:
        return fresh_name(Path("runs"), "debug" if debug else config.model, config.dataset)
    return Path(config.run_dir)
