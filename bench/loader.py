"""Images per second that come to a model's door: photographs from files and packs, and the usual.

The usual way is torchvision's ImageFolder with RandomResizedCrop(224), a flip, ToTensor, in a
DataLoader with a worker for each core. Ours ends with the same mirrored crops as uint8: they are
normalised on the device. Made-up photographs have ImageNet's sizes (in the mean about 470 x 390,
110 KB), others four times the sides, as telephones take them. Epochs of all arms, on one core and
on all, take turns; what they read lies in the page cache, but in a last epoch of each.
"""

import functools
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from bench.measure import arguments_of, finish, give_memory_back, ratio, shown, spread, table
from data.__main__ import main as data_command
from data.ahead import Threads
from data.cuts import Cuts, default_resize
from data.loaders import decoding_of, place
from data.photographs import PhotoSet, decoder, reduction
from data.sources import load_source
from distributed.accelerator import keep_freed_memory

SIZE, BATCH = 224, 64
CLASSES = 10
LARGER = 4  # times the sides

Epoch = Callable[[], int]


def photographs(folder: Path, count: int, times: int = 1) -> int:
    """So many made-up photographs below `folder`, of so many times the sides; their bytes."""
    draw = np.random.default_rng(0)
    total = 0
    for number in range(count):
        width = times * int(np.clip(draw.normal(470, 90), 160, 900))
        height = times * int(np.clip(draw.normal(390, 80), 160, 900))
        coarse = draw.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), 2)).astype(np.float32)
        grain = draw.normal(0, 21, (height // 2 + 1, width // 2 + 1, 1)).repeat(2, 0).repeat(2, 1)
        pixels = (smooth + grain[:height, :width]).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=92)
        path = folder / f"class{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
    return total


def as_usual(worker: int) -> None:
    """A worker's malloc, which would else keep what it frees, as its parent's does."""
    give_memory_back()


def usual(folder: Path, workers: int) -> Epoch:
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
        data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True,
        worker_init_fn=as_usual,
    )  # fmt: skip

    def epoch() -> int:
        return sum(len(labels) for _, labels in loader)

    return epoch


def as_trained(source_at: Path) -> tuple[PhotoSet, Cuts, tuple[float, ...]]:
    """The training photographs of a data set, and how they are cut."""
    source = load_source(str(source_at), image_size=SIZE)
    assert isinstance(source.train, PhotoSet)
    cuts = Cuts("resized_crop", SIZE, SIZE, default_resize(SIZE), "crop", 0)
    return source.train, cuts, source.mean


def ours(dataset: Path, scaled: bool, threads: int) -> Epoch:
    """An epoch of photographs in keyed order, as uint8: what is left is the device's."""
    photos, cuts, mean = as_trained(dataset)
    cpu = torch.device("cpu")
    pictures, _ = place(photos, cpu, decoding_of(cuts, mean, threads, cpu, scaled))
    epochs = iter(range(1_000_000))

    def epoch() -> int:
        number, seen = next(epochs), 0
        order = torch.randperm(len(pictures)).split(BATCH)
        batches = (pictures.__getitems__(indices) for indices in order)
        for batch in pictures.in_flight(batches, number):
            seen += len(batch["images"])
        return seen

    return epoch


@dataclass
class Arm:
    """One way to an epoch, on so many cores."""

    name: str
    cores: set[int]
    folder: Path  # what it reads
    made: Callable[[], Epoch]
    epoch: Epoch = lambda: 0

    def speeds(self) -> tuple[float, float]:
        """Images per second of an epoch now, and per second of CPU time that it took.

        Threads and workers keep the cores of their birth.
        """
        os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(len(self.cores))
        spent, began = cpu_seconds(), time.perf_counter()
        images = self.epoch()
        return images / (time.perf_counter() - began), images / (cpu_seconds() - spent)

    def begin(self) -> None:
        """Make what reads, anew: it holds no page of what it read before."""
        os.sched_setaffinity(0, self.cores)
        self.epoch = self.made()


def ways(folder: Path, cores: int) -> list[tuple[str, Path, Callable[[], Epoch]]]:
    """All that is compared: name, what is read, and what makes an epoch of it."""
    files = folder / "photographs"
    found: list[tuple[str, Path, Callable[[], Epoch]]] = [
        ("usual", files, functools.partial(usual, files, cores)),
        ("files", files, functools.partial(ours, files, False, cores)),
        ("files, scaled", files, functools.partial(ours, files, True, cores)),
    ]
    for store in ("jpeg", "raw"):
        if (folder / store).exists():
            at = folder / store
            found.append((f"{store} pack", at, functools.partial(ours, at, False, cores)))
    return found


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its children."""
    spent, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            spent += (int(stat[11]) + int(stat[12])) / ticks
    return spent


def forget(folder: Path) -> None:
    """Take what lies in a folder out of the page cache, as far as nobody holds it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measured(folder: Path, mask: set[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Images per second of each way, by number of cores: one a round, and one of a cold cache."""
    arms = [
        Arm(name, set(sorted(mask)[:cores]), at, made)
        for cores in dict.fromkeys((1, len(mask)))
        for name, at, made in ways(folder, cores)
    ]
    found: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        arm.begin()
    for turn in range(rounds + 1):
        for arm in random.Random(turn).sample(arms, len(arms)):
            speed, per_cpu = arm.speeds()
            if turn:
                of, cores = found.setdefault(arm.name, {}), len(arm.cores)
                of.setdefault(str(cores), []).append(speed)
                of.setdefault(f"{cores}, CPU", []).append(per_cpu)
    for arm in arms:
        if arm.name != "usual":  # whose workers map no file
            arm.begin()
    for arm in arms:
        if len(arm.cores) == len(mask):
            forget(arm.folder)
            found[arm.name]["cold"] = [arm.speeds()[0]]
    os.sched_setaffinity(0, mask)
    return found


def apart(folder: Path, epochs: int = 3) -> dict[str, float]:
    """How far the pixels of --decode scaled are from those of full, of 255, in random crops."""
    photos, cuts, _ = as_trained(folder)
    threads, indices = Threads(2), torch.arange(len(photos))
    total, most, count, smaller, rows = 0.0, 0, 0, 0, 0
    for epoch in range(epochs):
        for some in indices.split(BATCH):
            boxes = cuts.training(photos.sizes[some], some, epoch)
            smaller += sum(reduction(row) > 1 for row in boxes.rows)
            rows += len(boxes.rows)
            both = []
            for scaled in (False, True):
                work, images, _ = photos.photos.batch(
                    photos.places[some].tolist(), boxes, (0, 0, 0), threads, scaled=scaled
                )
                work.wait()
                both.append(images.int())
            differs = (both[0] - both[1]).abs()
            total, count = total + float(differs.sum()), count + differs.numel()
            most = max(most, int(differs.max()))
    threads.end()
    return {"mean": total / count, "largest": most, "smaller": smaller / rows}


def rows_of(found: dict[str, dict[str, list[float]]], cores: int) -> list[list[str]]:
    """A row for each way: one core, all cores, how well those work together, cold."""
    rows, usual = [], found["usual"]
    for name in sorted(found, key=lambda name: median(found[name]["1, CPU"])):
        of = found[name]
        cells = [shown(spread(of[key]), 0) for key in ("1", str(cores), "1, CPU")]
        cells.append(shown(ratio(of["1, CPU"], usual["1, CPU"]), 1))
        cells.append(shown(ratio(of[str(cores)], usual[str(cores)]), 1))
        for kind in ("", ", CPU"):
            pairs = zip(of[f"{cores}{kind}"], of[f"1{kind}"], strict=True)
            share = median(a / b for a, b in pairs) / (1 if kind else cores)
            cells.append(f"{100 * share:.0f} %")
        rows.append([name, *cells, f"{of['cold'][0]:.0f}"])
    return rows


def markdown(results: dict) -> str:
    """Tables of the speeds, and sentences on the pixels."""
    cores, parts = results["cores"], []
    for name, of in results["sets"].items():
        size = f"{of['kilobytes']:.0f} KB each"
        parts += [f"{of['images']} {name}, {size}, {results['decoder']}:", ""]
        head = ["images/s", "one core", f"{cores} cores", "per CPU second", "against the usual"]
        head += [f"on {cores} cores", "of cores x one", "of its CPU time", "cold cache"]
        parts += [table(head, rows_of(of["speeds"], cores)), ""]
        pixels = of["scaled"]
        parts += [
            f"`--decode scaled` decodes {100 * pixels['smaller']:.0f} % of these crops smaller; "
            f"its pixels are {pixels['mean']:.2f} of 255 from those of `full` in the mean, "
            f"{pixels['largest']} at most.", "",
        ]  # fmt: skip
    return "\n".join(parts[:-1])


def main() -> None:
    """Make photographs and packs of them, and measure with one core and with all of them."""
    parser = arguments_of(__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--large", type=int, default=100, help="of four times the sides; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lockstep-loader-"))
    keep_freed_memory()  # as a training does
    os.environ["LOCKSTEP_CACHE"] = str(folder / "cache")
    mask = os.sched_getaffinity(0)
    results: dict = {"decoder": decoder(), "cores": len(mask), "sets": {}}
    try:
        for name, images, times in (
            ("photographs of ImageNet's sizes", options.images, 1),
            ("photographs of four times the sides", options.large, LARGER),
        ):
            if not images:
                continue
            within = folder / str(times)
            size = photographs(within / "photographs", images, times)
            for store in ("jpeg", "raw"):
                words = ["prepare", "--dataset", str(within / "photographs"), "--store", store]
                if data_command([*words, "--out", str(within / store)]):
                    raise SystemExit(f"no {store} pack could be made")
            results["sets"][name] = {
                "images": images, "kilobytes": size / images / 1000,
                "scaled": apart(within / "photographs"),
                "speeds": measured(within, mask, options.rounds),
            }  # fmt: skip
            shutil.rmtree(within)
        print(markdown(results), file=sys.stdout)
        finish(options, results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
