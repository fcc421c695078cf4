"""CIFAR-10 as published: Python pickles, in a folder or an archive, read without running them."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.text import printable
from data.image_set import Decoded
from data.sources.cifar10 import CIFAR10
from data.sources.layout import Layout

ARCHIVE_NAME = "cifar-10-python.tar.gz"
BATCH_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def read(path: Path) -> Decoded:
    """The batches folder or archive -> 32x32 pictures.

    The pickles are read without running anything they ask for, and the archive without unpacking.
    """
    images, labels, is_test = [], [], []
    for name, content in _batch_contents(path):
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            data, targets = np.asarray(batch[b"data"]), [int(label) for label in batch[b"labels"]]
            if data.dtype != np.uint8 or data.shape != (len(targets), 3 * 32 * 32):
                raise ValueError(f"its data are {data.dtype} {data.shape}")
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"{name} in {printable(path)} is no CIFAR-10 batch: {printable(error)}. "
                "Fetch the data set again, from a source you trust.",
                code="bad-cifar-batch",
            ) from None
        images.append(data.reshape(-1, 3, 32, 32))
        labels += targets
        is_test += [name == "test_batch"] * len(targets)
    images = torch.from_numpy(np.concatenate(images))
    return Decoded(images, labels, is_test, CIFAR10.classes)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; refuses to import anything else."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how old protocols spell bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which is refused")


def _batch_folder(path: Path) -> Path | None:
    for folder in (path, path / "cifar-10-batches-py"):
        if any((folder / name).is_file() for name in BATCH_NAMES):
            return folder
    return None


def _batch_contents(path: Path) -> list[tuple[str, bytes]]:
    found: dict[str, bytes] = {}
    if folder := path.is_dir() and _batch_folder(path):
        found = {
            name: (folder / name).read_bytes() for name in BATCH_NAMES if (folder / name).is_file()
        }
    else:
        archive = path / ARCHIVE_NAME if path.is_dir() else path
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    fits = member.isreg() and name in BATCH_NAMES and member.size < 2**26
                    if fits and (file := tar.extractfile(member)):
                        found[name] = file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"{printable(archive)} is a damaged archive: {error}", code="bad-archive"
            ) from None
    if missing := [name for name in BATCH_NAMES if name not in found]:
        raise UserError(
            f"{printable(path)} lacks {', '.join(missing)} of CIFAR-10.", code="cifar-incomplete"
        )
    return [(name, found[name]) for name in BATCH_NAMES]


def _batch_files(path: Path) -> list[Path]:
    folder = _batch_folder(path) or path
    return [p for name in BATCH_NAMES if (p := folder / name).is_file()]


def _archive(path: Path) -> Path:
    return path / ARCHIVE_NAME if path.is_dir() else path


def _is_archive(path: Path) -> bool:
    return _archive(path).is_file() and _archive(path).name.endswith(".tar.gz")


BATCHES = Layout(
    "Python batches",
    lambda path: path.is_dir() and bool(_batch_folder(path)),
    files=_batch_files,
    read=read,
)
ARCHIVE = Layout("the archive", _is_archive, files=lambda path: [_archive(path)], read=read)
