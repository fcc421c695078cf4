"""How a global batch is shared out over processes and shards."""

from dataclasses import dataclass

from common.errors import UserError
from common.text import counted
from config.layers import Settings


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is shared out: batch_size = shards x micro_batch_size, the shards over processes.

    Where they do not divide the shards, the first ones compute one shard more than the others.
    """

    batch_size: int
    shards: int
    num_processes: int
    note: str = ""

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.shards

    @property
    def shares(self) -> list[int]:
        """How many shards each process computes; two of them differ by one at most."""
        each, more = divmod(self.shards, self.num_processes)
        return [each + (rank < more) for rank in range(self.num_processes)]

    def shards_of(self, process_index: int) -> slice:
        """Which shards a process computes."""
        first = sum(self.shares[:process_index])
        return slice(first, first + self.shares[process_index])

    @property
    def used(self) -> float:
        """The part of the processes' time that computes: some wait for those with a shard more."""
        return self.shards / (self.num_processes * max(self.shares))

    def in_words(self) -> str:
        """The batch as an equation, and what it costs where some processes wait for others."""
        images, most = counted(self.micro_batch_size, "image"), max(self.shares)
        processes = counted(self.num_processes, "process")
        if most == min(self.shares):
            return f"{self.batch_size} = {processes} x {counted(most, 'shard')} x {images}"
        enough, faster = -(-self.shards // most), -(-self.shards // (most - 1))
        as_fast = f"{enough} are as fast, " if enough < self.num_processes else ""
        return (
            f"{self.batch_size} = {counted(self.shards, 'shard')} x {images}, {most} or {most - 1} "
            f"on each of {processes}: {100 * self.used:.0f} % of their time is used; {as_fast}"
            f"{faster} are faster"
        )


def plan_batch(settings: Settings, num_processes: int, num_images: int) -> BatchPlan:
    """The batch that is possible: recipes are rounded, what a user typed is checked.

    One process that rehearses more has their shards, each of which it computes.
    """
    c, note, here = settings.config, "", num_processes
    num_processes = settings.actions.as_processes or num_processes
    shards = num_processes * c.accumulate if c.shards == "auto" else int(c.shards)
    if num_processes > shards:
        raise UserError(
            f"{num_processes} processes cannot share {counted(shards, 'shard')}: each computes at "
            f"least one; start at most {counted(shards, 'process')}, or a new run with "
            f"--shards {num_processes} or more",
            code="too-few-shards",
        )
    batch = c.batch_size
    if batch % shards:
        low, high = batch // shards * shards, (batch // shards + 1) * shards
        if settings.asked("batch_size"):
            options = f"{low} and {high} do" if low else f"{high} does"
            raise UserError(
                f"--batch-size {batch} does not divide over {shards} shards "
                f"({counted(num_processes, 'process')}); {options}",
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
