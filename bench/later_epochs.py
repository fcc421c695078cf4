"""What an image of a later epoch costs at 64 pixels: of a raw pack in the cache, beside memory.

In memory lie the same photographs cut to their middle squares of 64 pixels, as every folder did
before photographs were kept whole: each epoch draws windows out of those 64 pixels. A raw pack has
whole pictures, of which each epoch cuts and scales a part anew. The epochs of all arms, with the
augmentation that follows and without a model, take turns on one core; what they read lies in the
page cache. A step of resnet18 at 64 pixels on that core says what the difference is a part of.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bench.loader import photographs
from bench.measure import arguments_of, finish, ratio, shown, spread, table
from data.augment import Augment
from data.cuts import Cuts, default_resize
from data.files import square
from data.loaders import Photographs, Resident, decoding_of, place
from data.photographs import PhotoSet
from data.sources import load_source
from distributed.accelerator import keep_freed_memory
from models import build_model

SIZE, BATCH = 64, 64
KINDS = ("crop", "resized_crop")

Epoch = Callable[[int], None]


def epoch(pictures: Resident | Photographs, augment: Augment, order: Tensor, number: int) -> None:
    """All images once, ready for a model."""
    batches = (pictures.__getitems__(some) for some in order.split(BATCH))
    for batch in pictures.in_flight(batches, number):
        augment.train(batch["images"], batch["indices"], number)


def epochs(folder: Path) -> dict[tuple[str, str], Epoch]:
    """An epoch of each arm and kind of augmentation, by its number."""
    cpu, found = torch.device("cpu"), {}
    homes = {
        home: load_source(str(folder), image_size=SIZE, keep_decoded=home == "raw pack")
        for home in ("files", "raw pack")
    }
    files = homes["files"].train
    assert isinstance(files, PhotoSet)
    squares = torch.stack([
        torch.from_numpy(np.array(square(Image.fromarray(files.photos.pixels(place)), SIZE)))
        for place in files.places.tolist()
    ]).permute(0, 3, 1, 2).contiguous()  # fmt: skip
    for kind in KINDS:
        cuts = Cuts(kind, SIZE, SIZE, default_resize(SIZE), "crop", 0)
        for home in ("memory", "raw pack", "files"):
            source = homes.get(home, homes["files"])
            pictures = Resident(squares, files.labels)
            if home != "memory":
                decoding = decoding_of(cuts, source.mean, 1, cpu)
                pictures, _ = place(source.train, cpu, decoding)
            augment = Augment(
                kind, SIZE, source.mean, source.std, 0, cut=not isinstance(pictures, Resident)
            )
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))

            found[home, kind] = partial(epoch, pictures, augment, order)
    return found


def step_of_a_model() -> Callable[[], None]:
    """A training step of resnet18 on one batch."""
    model = build_model("resnet18", num_classes=10, image_size=SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def cpu_milliseconds(work: Callable[[], None], images: int) -> float:
    """CPU time of this process and its threads for an image."""
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began) / images


def main() -> None:
    """Make photographs, and measure."""
    parser = arguments_of(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-later-"))
    keep_freed_memory()  # as a training does
    os.environ["LOCKSTEP_CACHE"] = str(folder / "cache")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    try:
        photographs(folder / "photographs", options.images)
        arms, step = epochs(folder / "photographs"), step_of_a_model()
        series: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
        steps = []
        for turn in range(options.rounds + 1):
            for arm in random.Random(turn).sample(list(arms), len(arms)):
                spent = cpu_milliseconds(lambda arm=arm, turn=turn: arms[arm](turn), options.images)
                series[arm] += [spent] * bool(turn)
            steps += [cpu_milliseconds(step, BATCH)] * bool(turn)
        rows = []
        for home, kind in arms:
            of = series[home, kind]
            times = ratio(of, series["memory", kind])
            share = ratio([a - b for a, b in zip(of, series["memory", kind], strict=True)], steps)
            cells = [shown(spread(of)), shown(times, 1), f"{100 * share['median']:.1f} %"]
            rows.append([home, kind, *cells])
        head = ["pictures lie in", "`--augment`", "CPU ms an image", "of memory's"]
        print(table([*head, "more, of a resnet18 step"], rows))
        print(f"\na step of resnet18: {shown(spread(steps))} CPU ms an image", file=sys.stdout)
        named = {f"{home}, {kind}": values for (home, kind), values in series.items()}
        finish(options, {"cpu_ms": named, "step": steps})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
