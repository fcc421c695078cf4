"""How a global batch is shared out over processes and shards."""

from dataclasses import dataclass

from config.layers import Settings
from errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is shared out: batch_size = num_processes x per_process x micro_batch_size."""

    batch_size: int
    shards: int
    num_processes: int
    note: str = ""

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.shards

    @property
    def shards_per_process(self) -> int:
        return self.shards // self.num_processes


def plan_batch(settings: Settings, num_processes: int, num_images: int) -> BatchPlan:
    """The batch that is possible: recipes are rounded, what a user typed is checked.

    One process that rehearses more has their shards, each of which it computes.
    """
    c, note, here = settings.config, "", num_processes
    num_processes = settings.actions.as_processes or num_processes
    shards = num_processes * c.accumulate if c.shards == "auto" else int(c.shards)
    if shards % num_processes:
        possible = [n for n in range(1, shards + 1) if shards % n == 0]
        raise UserError(
            f"{num_processes} processes cannot share {shards} shards evenly; numbers that can: "
            f"{', '.join(map(str, possible))}",
            code="uneven-shards",
        )
    batch = c.batch_size
    if batch % shards:
        low, high = batch // shards * shards, (batch // shards + 1) * shards
        if settings.asked("batch_size"):
            options = f"{low} and {high} do" if low else f"{high} does"
            raise UserError(
                f"--batch-size {batch} does not divide over {shards} shards "
                f"({num_processes} processes x {shards // num_processes} each); {options}",
                code="uneven-batch",
            )
        batch = low or high
        note = (
            f"batch {c.batch_size} of the recipe rounded to {batch}, which {shards} shards divide"
        )
    if num_images < shards:
        raise UserError(
            f"{num_images} training images are fewer than the {shards} shards of a batch; "
            "use fewer processes or less --accumulate",
            code="too-few-images",
        )
    if batch > num_images:
        smaller = num_images // shards * shards
        note = f"batch {batch} lowered to {smaller}: there are only {num_images} training images"
        batch = smaller
    return BatchPlan(batch, shards, here, note)
