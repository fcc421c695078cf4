"""Images per second that come to a model's door: photographs from files and packs, and the usual.

The usual way is torchvision's ImageFolder with RandomResizedCrop(224), a flip, ToTensor, in a
DataLoader with a worker for each core. Ours ends with the same mirrored crops as uint8: they are
normalised on the device. Made-up photographs have ImageNet's sizes (in the mean about 470 x 390,
110 KB). Epochs of all arms take turns; what they read lies in the page cache.
"""

import io
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import arguments_of, finish, ratio, shown, spread, table
from data.__main__ import main as data_command
from data.cuts import Cuts, default_resize
from data.loaders import decoding_of, place
from data.photographs import decoder
from data.sources import load_source

SIZE, BATCH = 224, 64
CLASSES = 10


def photographs(folder: Path, count: int) -> int:
    """So many made-up photographs below `folder`; their bytes."""
    draw = np.random.default_rng(0)
    total = 0
    for number in range(count):
        width = int(np.clip(draw.normal(470, 90), 160, 900))
        height = int(np.clip(draw.normal(390, 80), 160, 900))
        coarse = draw.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), 2)).astype(np.float32)
        grain = draw.normal(0, 16, (height // 2 + 1, width // 2 + 1, 1)).repeat(2, 0).repeat(2, 1)
        pixels = (smooth + grain[:height, :width]).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=92)
        path = folder / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
    return total


def usual(folder: Path, workers: int) -> Callable[[], int]:
    """An epoch of torchvision's reference input pipeline; its persistent workers are warm."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(SIZE, antialias=True),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    data = ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(
        data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )

    def epoch() -> int:
        return sum(len(labels) for _, labels in loader)

    return epoch


def ours(dataset: Path, threads: int) -> Callable[[], int]:
    """An epoch of photographs in keyed order, as uint8: what is left is the device's."""
    source = load_source(str(dataset), image_size=SIZE)
    cuts = Cuts("resized_crop", SIZE, SIZE, default_resize(SIZE), "crop", 0)
    cpu = torch.device("cpu")
    pictures, _ = place(source.train, cpu, decoding_of(cuts, source.mean, threads, cpu))
    epochs = iter(range(1_000_000))

    def epoch() -> int:
        number, seen = next(epochs), 0
        order = torch.randperm(len(pictures)).split(BATCH)
        batches = (pictures.__getitems__(indices) for indices in order)
        for batch in pictures.in_flight(batches, number):
            seen += len(batch["images"])
        return seen

    return epoch


def arms(folder: Path, threads: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """All that is compared, by name."""
    yield "usual", usual(folder / "photographs", threads)
    yield "files", ours(folder / "photographs", threads)
    for name in ("jpeg", "raw"):
        if (folder / name).exists():
            yield f"{name} pack", ours(folder / name, threads)


def measured(folder: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each arm in each round, after one that is not counted."""
    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {}
    ready = list(arms(folder, threads))
    for round_number in range(rounds + 1):
        for name, epoch in random.Random(round_number).sample(ready, len(ready)):
            began = time.perf_counter()
            images = epoch()
            speed = images / (time.perf_counter() - began)
            if round_number:
                found.setdefault(name, []).append(speed)
    return found


def main() -> None:
    """Make photographs and packs of them, and measure with one thread and with all cores."""
    parser = arguments_of(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-packs", dest="packs", action="store_false")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-loader-"))
    os.environ["LOCKSTEP_CACHE"] = str(folder / "cache")
    try:
        size = photographs(folder / "photographs", options.images)
        print(f"{options.images} photographs, {size / options.images / 1000:.0f} KB each")
        for store in ("jpeg", "raw") if options.packs else ():
            words = ["prepare", "--dataset", str(folder / "photographs"), "--store", store]
            if data_command([*words, "--out", str(folder / store)]):
                raise SystemExit(f"no {store} pack could be made")
        mask = os.sched_getaffinity(0)
        cores = len(mask)
        result = {"decoder": decoder(), "cores": cores, "images": options.images, "speeds": {}}
        rows = []
        for threads in dict.fromkeys((1, cores)):
            os.sched_setaffinity(0, set(sorted(mask)[:threads]))  # one core for one thread
            found = measured(folder, threads, options.rounds)
            result["speeds"][str(threads)] = found
            for name, speeds in found.items():
                against = ratio(speeds, found["usual"])
                rows.append([name, str(threads), shown(spread(speeds), 0), shown(against)])
        print(table(["arm", "cores", "images/s", "against the usual"], rows))
        finish(options, result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
