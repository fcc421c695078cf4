"""The two DataLoaders that Accelerate prepares, over data that stays where the device reads it."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.order import EvaluationBatchSampler, GlobalBatchSampler
from data.sources import ImageSet

EVALUATION_BATCH = 128  # images per forward and process: the same shape on any number of them
LARGEST_EVALUATION_BATCH = 1024  # on a GPU, where a small batch costs the host more than the device
EVALUATION_PIXELS = (
    2**24
)  # of a batch on a GPU, at the model's size: what memory there holds easily


class Resident(Dataset):
    """Images in memory, handed out a batch per indexing operation.

    A batch is {"images", "labels", "indices", "weights"}; index -1 is padding and weighs 0.
    `features`, once something sets them, are handed out in place of the images.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        places = indices.clamp(min=0)
        return {
            "images": (self.images if self.features is None else self.features)[places],
            "labels": self.labels[places],
            "indices": indices,
            "weights": (indices >= 0).long(),
        }


def place(images: ImageSet, device: torch.device) -> tuple[Resident, torch.device]:
    """The data set on the device if it takes less than a third of its free memory, else here."""
    home = torch.device("cpu")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if images.images.numel() * images.images.element_size() < free / 3:
            home = device
    return Resident(images.images.to(home), images.labels.to(home)), home


def build_train_loader(
    images: ImageSet, batch_size: int, seed: int, device: torch.device
) -> tuple[DataLoader, GlobalBatchSampler]:
    """Global batches in keyed order; `sampler.start(epoch, step)` before each pass."""
    data, home = place(images, device)
    sampler = GlobalBatchSampler(len(data), batch_size, seed, device=home)
    return _loader(data, sampler, home, device), sampler


def evaluation_batch(num_images: int, image_size: int, device: torch.device) -> int:
    """Images per forward and process, a constant of the run on one kind of device.

    On a GPU a batch is as large as the images at the model's size allow, in steps of 32 images and
    at least what it is on a CPU, but none is larger than the whole set.
    """
    if device.type == "cpu":
        return EVALUATION_BATCH
    whole = -(-num_images // EVALUATION_BATCH) * EVALUATION_BATCH
    most = min(LARGEST_EVALUATION_BATCH, EVALUATION_PIXELS // image_size**2 // 32 * 32, whole)
    return max(EVALUATION_BATCH, most)


def build_test_loader(images: ImageSet, batch_size: int, device: torch.device) -> DataLoader:
    """Every image once, in equal global batches of batch_size; padding weighs 0."""
    data, home = place(images, device)
    sampler = EvaluationBatchSampler(len(data), batch_size, device=home)
    return _loader(data, sampler, home, device)


def _loader(
    data: Resident, sampler: GlobalBatchSampler | EvaluationBatchSampler, home: torch.device,
    device: torch.device,
) -> DataLoader:  # fmt: skip
    return DataLoader(
        data,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType] - tensors, no lists
        collate_fn=lambda batch: batch,
        pin_memory=home.type == "cpu" and device.type == "cuda",
    )
