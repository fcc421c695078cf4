"""The two DataLoaders that Accelerate prepares, over data that stays where the device reads it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.ahead import Ahead, Threads, Work
from data.cuts import Cuts
from data.grey import mean_colour
from data.order import Balance, EvaluationBatchSampler, GlobalBatchSampler
from data.photographs import PhotoSet
from data.sources import ImageSet

BATCHES_AHEAD = 3  # decoded while one is used: pictures come in uneven sizes
NOT_COUNTED = -100  # the label that torch's losses leave out
EVALUATION_BATCH = 128  # images per forward and process: the same shape on any number of them
LARGEST_EVALUATION_BATCH = 1024  # on a GPU, where a small batch costs the host more than the device
# Of a batch, at the model's size: what memory holds easily (resnet18's maps on a CPU: 0.3 GB).
EVALUATION_PIXELS, EVALUATION_PIXELS_CPU = 2**24, 2**21


class Resident(Dataset):
    """Images in memory, handed out a batch per indexing operation.

    A batch is {"images", "labels", "indices", "weights"}; index -1 is padding and weighs 0.
    `features`, once something sets them, are handed out in place of the images.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels
        self.features: Tensor | None = None
        self.repeats = False  # index i + k * n is the k-th repetition of i: order.Balance
        self.share: int | None = None  # of a slice of a batch, where the rest of it is padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        return self.batch(indices[: self.share])

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of these, in training's form though not in its place."""
        places = indices.clamp(min=0)
        if self.repeats:
            places %= len(self)
        return {
            "images": (self.images if self.features is None else self.features)[places],
            "labels": self.labels[places],
            "indices": indices,
            "weights": (indices >= 0).long(),
        }

    def seen(self, indices: Tensor) -> Tensor:
        """Uint8 images (n, 3, H, W) of these, as evaluation is given them."""
        return self.images[indices.to(self.images.device)]

    def shown(self, indices: Tensor) -> Tensor:
        """Uint8 images (n, 3, H, W) of these, also where training is given features."""
        return self.seen(indices)

    def in_flight(self, batches: Iterable[dict], epoch: int | None) -> Iterator[dict]:
        """The batches of a loader, whole: these are so already."""
        yield from batches


class Photographs(Dataset):
    """Photographs, of which the loader hands out who they are, and `in_flight` adds the images.

    A batch is {"labels", "indices", "weights", "rows"}; `rows` is a list of indices on the host,
    which Accelerate leaves where it is. A picture that cannot be decoded weighs 0: in training its
    label is -100, which no loss counts, in evaluation it is padding.
    """

    features = None
    repeats = False  # as Resident has it
    share: int | None = None

    def __init__(self, pictures: PhotoSet, decoding: "Decoding"):
        self.pictures, self.decoding = pictures, decoding
        self.labels = pictures.labels
        self.sizes = pictures.sizes
        self.ahead = Ahead(BATCHES_AHEAD, pictures.photos.tell_slow)
        self.left_out = 0  # rows of the latest pass that could not be decoded, on this process

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor | list[int]]:
        return self._named(indices[: self.share])

    def _named(self, indices: Tensor) -> dict[str, Tensor | list[int]]:
        return {
            "labels": self.labels[indices.clamp(min=0) % len(self)],
            "indices": indices,
            "weights": (indices >= 0).long(),
            "rows": indices.tolist(),
        }

    def seen(self, indices: Tensor) -> Tensor:
        """Uint8 images (n, 3, S, S) of these, as evaluation is given them."""
        return self._at_once(indices, None)["images"]

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of these, in training's form though not in its place."""
        return self._at_once(indices, 0)

    def _at_once(self, indices: Tensor, epoch: int | None) -> dict[str, Tensor]:
        work, whole = self._begin(self._named(indices), epoch)
        work.wait(slow=self.pictures.photos.tell_slow)
        return whole()

    def shown(self, indices: Tensor) -> Tensor:
        """Uint8 images (n, 3, S, S) of these, as training is given them in its first epoch."""
        return self.batch(indices)["images"]

    def in_flight(self, batches: Iterable[dict], epoch: int | None) -> Iterator[dict[str, Tensor]]:
        """The batches of a loader with their images; some are decoded while one is used.

        They are cut as in training in this epoch, or, where it is None, as in evaluation.
        """
        self.left_out = 0
        yield from self.ahead.over(batches, partial(self._begin, epoch=epoch))

    def _begin(self, batch: dict, epoch: int | None) -> tuple[Work, Callable[[], dict]]:
        decoding, rows = self.decoding, torch.tensor(batch.pop("rows"))
        chosen = rows.clamp(min=0) % len(self)
        sizes = self.sizes[chosen]
        if epoch is None:
            boxes = decoding.cuts.evaluation(sizes)
        else:
            boxes = decoding.cuts.training(sizes, rows, epoch)
        places = self.pictures.places[chosen].masked_fill(rows < 0, -1).tolist()
        work, images, bad = self.pictures.photos.batch(
            places, boxes, decoding.fill, decoding.threads, decoding.device.type == "cuda",
            decoding.scaled,
        )  # fmt: skip

        def whole() -> dict[str, Tensor]:
            found = {**batch, "images": images.to(decoding.device, non_blocking=True)}
            if bad:
                self.left_out += len(bad)
                where = torch.tensor(bad, device=batch["labels"].device)
                nothing = {"weights": 0}
                nothing |= {"indices": -1} if epoch is None else {"labels": NOT_COUNTED}
                for key, value in nothing.items():
                    found[key] = batch[key].index_fill(0, where, value)
            return found

        return work, whole


@dataclass(frozen=True)
class Decoding:
    """How photographs become batches: the cuts, the fill colour, the threads that work ahead."""

    cuts: Cuts
    fill: tuple[int, int, int]
    threads: Threads
    device: torch.device
    scaled: bool = False  # JPEGs are decoded smaller where that is enough: other pixels


def decoding_of(
    cuts: Cuts, mean: tuple[float, ...], threads: int, device: torch.device, scaled: bool = False
) -> Decoding:
    """Photographs cut in this way by so many threads; what is empty has the mean colour."""
    return Decoding(cuts, mean_colour(mean), Threads(threads), device, scaled)


def place(
    pictures: ImageSet | PhotoSet, device: torch.device, decoding: Decoding | None = None
) -> tuple[Resident | Photographs, torch.device]:
    """The data set on the device if it takes less than a third of its free memory, else here."""
    home = torch.device("cpu")
    if isinstance(pictures, PhotoSet):
        assert decoding is not None  # as it was made for them
        return Photographs(pictures, decoding), home
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if pictures.images.numel() * pictures.images.element_size() < free / 3:
            home = device
    return Resident(pictures.images.to(home), pictures.labels.to(home)), home


def build_train_loader(
    images: ImageSet | PhotoSet, batch_size: int, seed: int, device: torch.device,
    decoding: Decoding | None = None, balanced: bool = False, shares: Sequence[int] = (),
    process_index: int = 0,
) -> tuple[DataLoader, GlobalBatchSampler]:  # fmt: skip
    """Global batches in keyed order; `sampler.start(epoch, step)` before each pass.

    `shares`: the images of a batch that each process gets, of which this is one; () is one process.
    """
    data, home = place(images, device, decoding)
    data.repeats = balanced
    balance = Balance(data.labels) if balanced else None
    sampler = GlobalBatchSampler(
        len(data), batch_size, seed, device=home, balance=balance, shares=shares
    )
    data.share = sampler.shares[process_index]
    return _loader(data, sampler, home, device), sampler


def evaluation_batch(num_images: int, image_size: int, device: torch.device) -> int:
    """Images per forward and process, a constant of the run on one kind of device.

    As many as the memory of their maps allows at the model's size: on a CPU in steps of 8 and at
    most 128, on a GPU in steps of 32 and no more than the whole set.
    """
    if device.type == "cpu":
        return min(EVALUATION_BATCH, max(8, EVALUATION_PIXELS_CPU // image_size**2 // 8 * 8))
    whole = -(-num_images // EVALUATION_BATCH) * EVALUATION_BATCH
    most = max(32, EVALUATION_PIXELS // image_size**2 // 32 * 32)
    return min(LARGEST_EVALUATION_BATCH, most, whole)


def build_test_loader(
    images: ImageSet | PhotoSet, batch_size: int, device: torch.device,
    decoding: Decoding | None = None,
) -> DataLoader:  # fmt: skip
    """Every image once, in equal global batches of batch_size; padding weighs 0."""
    data, home = place(images, device, decoding)
    sampler = EvaluationBatchSampler(len(data), batch_size, device=home)
    return _loader(data, sampler, home, device)


def _loader(
    data: Resident | Photographs,
    sampler: GlobalBatchSampler | EvaluationBatchSampler,
    home: torch.device,
    device: torch.device,
) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType] - tensors, no lists
        collate_fn=lambda batch: batch,
        pin_memory=home.type == "cpu" and device.type == "cuda",
    )
