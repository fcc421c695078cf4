"""What augmentation costs: microseconds an image, in batches here and one by one in torchvision.

The same kinds twice, taking turns: data/augment.py on a batch of uint8 images where they lie, and
torchvision's transforms on PIL images, which is what a DataLoader's worker does. One thread each,
so that a column is the work of one core; on a GPU the first column is the GPU's.
"""

import sys
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from bench.measure import arguments_of, compare, finish, ratio, shown, spread, table
from data.augment import Augment

Batcher = Callable[[numpy.ndarray, Tensor], tuple[Tensor, Tensor]]

MEAN, STD, CLASSES = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), 10
SIDE = 32  # of the images that come in, as CIFAR-10's
# name -> (kind, output side, more of Augment)
KINDS = {
    "none": ("none", 32, {}),
    "flip": ("flip", 32, {}),
    "alternating flip": ("flip", 32, {"alternating_flip": True}),
    "crop": ("crop", 32, {}),
    "translate": ("translate", 32, {}),
    "crop, cutout": ("crop", 32, {"cutout": 8}),
    "crop, mixup": ("crop", 32, {"mixup": 0.2}),
    "crop, cutmix": ("crop", 32, {"cutmix": 1.0}),
    "resized_crop": ("resized_crop", 32, {}),
    "none at 224": ("none", 224, {}),
    "resized_crop at 224": ("resized_crop", 224, {}),
    "crop, RandAugment(2, 10)": ("crop|randaugment(2,10)", 32, {}),
    "crop, TrivialAugment": ("crop|trivialaugment", 32, {}),
    "crop, jitter": ("crop|jitter", 32, {}),
    "crop, blur": ("crop|blur(1)", 32, {}),
    "crop, rotate": ("crop|rotate(15)", 32, {}),
    "crop, erase": ("crop|erase(1)", 32, {}),
}


def theirs(kind: str, size: int, more: dict) -> Batcher:
    """A function from uint8 images (n, H, W, 3) and labels (n,) to a batch, by torchvision."""
    from PIL import Image
    from torchvision.transforms import v2

    kind, _, step = kind.partition("|")
    moves = {
        "none": [],
        "crop": [v2.RandomCrop(SIDE, padding=SIDE // 8)],
        "translate": [v2.RandomCrop(SIDE, padding=2, padding_mode="reflect")],
        "resized_crop": [v2.RandomResizedCrop(size)],
    }.get(kind, [])
    if kind != "none":
        moves.append(v2.RandomHorizontalFlip())
    elif size != SIDE:
        moves.append(v2.Resize(size))
    bilinear = v2.InterpolationMode.BILINEAR
    moves += {
        "randaugment(2,10)": [v2.RandAugment(2, 10)],
        "trivialaugment": [v2.TrivialAugmentWide()],
        "jitter": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "blur(1)": [v2.GaussianBlur(3)],
        "rotate(15)": [v2.RandomRotation([-15, 15], bilinear)],
    }.get(step, [])
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    erase = [v2.RandomErasing(1.0, (1 / 16, 1 / 16), (1.0, 1.0))] if "cutout" in more else []
    erase += [v2.RandomErasing(1.0)] if step == "erase(1)" else []
    transform = v2.Compose([*moves, *to_tensor, v2.Normalize(MEAN, STD), *erase])
    mixes = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    mix = next((mixes[k](alpha=more[k], num_classes=CLASSES) for k in mixes if k in more), None)

    def batch(images: numpy.ndarray, labels: Tensor) -> tuple[Tensor, Tensor]:
        done = torch.stack([transform(Image.fromarray(image)) for image in images])
        return mix(done, labels) if mix else (done, labels)

    return batch


def measure(name: str, batch_size: int, rounds: int) -> dict:
    kind, size, more = KINDS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    augment = Augment(kind, size, MEAN, STD, seed=0, **more)
    images = torch.randint(0, 256, (batch_size, 3, SIDE, SIDE), dtype=torch.uint8)
    labels, indices = torch.arange(batch_size) % CLASSES, torch.arange(batch_size, device=device)
    pictures, on_device = images.permute(0, 2, 3, 1).contiguous().numpy(), images.to(device)
    one_by_one = theirs(kind, size, more)

    def ours() -> None:
        done = augment.train(on_device, indices, epoch=1)
        if augment.mixup or augment.cutmix:
            augment.mix(done, labels.to(device), indices, 1, CLASSES)

    pair = {"lockstep": ours, "torchvision": lambda: one_by_one(pictures, labels)}
    series = compare(pair, rounds)
    found = {key: spread([1e6 * s / batch_size for s in v]) for key, v in series.items()}
    return found | {"times": ratio(series["torchvision"], series["lockstep"])}


def markdown(results: dict) -> str:
    rows = [
        [name, *(shown(found[key], 1) for key in ("lockstep", "torchvision", "times"))]
        for name, found in results.items()
    ]
    return table(["µs an image", "lockstep", "torchvision", "ratio"], rows)


def main() -> int:
    parser = arguments_of(__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, arguments.batch_size, arguments.rounds) for name in KINDS}
    print(markdown(results))
    finish(arguments, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
