"""A data set in one checksummed file, made by `python -m data prepare --out FILE.safetensors`."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from common.text import printable
from data.cache import Entry, read_entry, write_entry
from data.files import SMALL
from data.image_set import Source, in_memory, kept_beside
from data.sources.describe import packed
from data.sources.layout import Layout
from data.sources.published import Published


def save(source: Source, path: Path, image_size: int | None) -> None:
    """All of a data set in one checksummed file, which takes its place where a path is asked for.

    It needs no decoder and none of the packages that read tables. image_size is what the pictures
    were decoded for.
    """
    train, test = in_memory(source.train), in_memory(source.test)
    tensors = {"train_images": train.images, "train_labels": train.labels}
    tensors |= {"test_images": test.images, "test_labels": test.labels}
    beside, facts = kept_beside(source)
    tensors |= packed(source.names) | beside
    names = ("name", "classes", "mean", "std", "fingerprint", "skipped")
    meta = {name: getattr(source, name) for name in names} | {"image_size": image_size}
    if not write_entry(path, tensors, meta | facts):
        raise UserError(
            f"{printable(path)} cannot be written; try --out data.safetensors",
            code="output-unwritable",
        )


def read(path: Path, image_size: int | None, known: Mapping[str, Published], name: str) -> Entry:
    """The data set in the file, if it is the one of this name or was decoded for this size.

    `known` are the published data sets: those have one size, whatever is asked for.
    """
    entry = read_entry(path)
    if entry is None or "image_size" not in entry[1]:
        raise UserError(
            f"{printable(path)} is damaged or no data set of this program: make it with "
            "python -m data prepare --out FILE.safetensors",
            code="bad-data-file",
        )
    tensors, meta = entry
    if name in known and meta["name"] != name:
        raise UserError(
            f"what lies in {printable(path)} is not {known[name].title}; type "
            f"--dataset {printable(path)} to train on it.",
            code="other-data-set",
        )
    side = tensors["train_images"].shape[-1]
    decoded = side > SMALL or side == meta["image_size"]  # smaller ones may be as they came
    if meta["name"] not in known and decoded and image_size not in (None, side):
        raise UserError(
            f"the pictures in {printable(path)} were decoded for --image-size {side}: type that, "
            f"or make another with python -m data prepare --image-size {image_size} --out FILE",
            code="other-image-size",
        )
    return {key: tensor.clone() for key, tensor in tensors.items()}, meta  # no longer of the file


TENSORS = Layout(
    "decoded tensors",
    lambda path: path.is_file() and path.suffix == ".safetensors",
    entry=read,
)
