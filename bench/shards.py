"""What logical shards cost: 8 shards on one process against plain accumulation; 1 against none.

The same forward and backward over the same micro-batches, in turns: through distributed/shards.py,
the same with --bitwise, and in a bare loop. Goal: within 3 % without --bitwise.
"""

import sys
from functools import partial

import torch

from bench.measure import arguments_of, compare, finish, ratio, shown, spread, table
from config import BatchPlan
from distributed.shards import Shards
from models import build_model
from tasks import build_task


def markdown(results: dict) -> str:
    columns = ("shards", "bitwise", "plain", "shards/plain", "bitwise/plain")
    rows = [[name, *(shown(found[k], 3) for k in columns)] for name, found in results.items()]
    head = ["", "seconds", "--bitwise, s", "plain accumulation, s", "ratio", "ratio of --bitwise"]
    return table(head, rows)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--shards", default="1,8")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    size, micro = arguments.image_size, arguments.micro_batch
    model = build_model(arguments.model, num_classes=10, image_size=size)
    model = model.to(accelerator.device).to(memory_format=torch.channels_last).train()
    task = build_task("classification", 10, 0.0, model)
    results = {}
    for count in map(int, arguments.shards.split(",")):
        plan = BatchPlan(count * micro, count, num_processes=1)
        images = torch.randn(plan.batch_size, 3, size, size, device=accelerator.device)
        batch = {
            "images": images.contiguous(memory_format=torch.channels_last),
            "labels": torch.arange(plan.batch_size, device=accelerator.device) % 10,
        }
        plain_sums, exact_sums = (
            Shards(accelerator, model, plan, lambda step, shard: step + shard, bitwise)
            for bitwise in (False, True)
        )

        def through(shards: Shards, batch: dict[str, torch.Tensor] = batch) -> None:
            for part in shards(batch, 0):
                loss = task.loss(model(part["images"]), part["labels"])
                accelerator.backward(shards.weighed(loss))
            model.zero_grad()

        def plainly(batch: dict[str, torch.Tensor] = batch, plan: BatchPlan = plan) -> None:
            parts = (batch[name].split(micro) for name in ("images", "labels"))
            for images, labels in zip(*parts, strict=True):
                loss = task.loss(model(images), labels)
                accelerator.backward(loss / plan.batch_size)
            model.zero_grad()

        arms = {
            "shards": partial(through, plain_sums),
            "bitwise": partial(through, exact_sums),
            "plain": plainly,
        }
        series = compare(arms, arguments.rounds)
        found = results[f"{count} shards"] = {k: spread(v) for k, v in series.items()}
        for name in ("shards", "bitwise"):
            found[f"{name}/plain"] = ratio(series[name], series["plain"])
    print(f"{arguments.model}, micro-batch {micro}, median (range) of {arguments.rounds} rounds:\n")
    print(markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
