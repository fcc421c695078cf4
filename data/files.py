"""Pictures from disk: class folders, tables and CIFAR batches -> upright RGB, uint8."""

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.text import printable
from errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # Pillow's others include programs (EPS)
MAX_PIXELS = 89_000_000
SMALL = 64  # pixels: pictures that share a size up to this one are kept as they are
TEST_NAMES = ("test", "validation", "valid", "val", "dev")
CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@dataclass(frozen=True)
class Records:
    """Encoded pictures (bytes, or the path of a file) with a name for errors, label and split."""

    items: list[bytes | Path]
    names: list[str]
    labels: list[int]
    is_test: list[bool]
    classes: tuple[str, ...]


def layout(path: Path) -> str:
    """What lies there: "batches", "archive", "tables", "tensors" or "folder" (of class folders)."""
    if path.is_file() and path.name.endswith(".tar.gz"):
        return "archive"
    if path.is_file() and path.suffix in {".parquet", ".arrow"}:
        return "tables"
    if path.is_file() and path.suffix == ".safetensors":
        return "tensors"
    if path.is_dir():
        if _batch_folder(path):
            return "batches"
        if (path / CIFAR_ARCHIVE).is_file():
            return "archive"
        if table_files(path):
            return "tables"
        if _subfolders(path):
            return "folder"
    raise UserError(
        f"{printable(path)} holds no pictures this program can read: give a folder with one "
        "subfolder of images per class, a parquet file or a folder of them, a save_to_disk "
        "folder, or the cifar-10-batches-py folder.",
        code="unknown-layout",
    )


def source_files(path: Path, kind: str) -> list[Path]:
    """The files a data set is read from, sorted: their sizes and times tell whether it changed."""
    if kind == "batches":
        return [p for name in CIFAR_BATCHES if (p := _batch_folder(path) / name).is_file()]
    if kind == "archive":
        return [path / CIFAR_ARCHIVE if path.is_dir() else path]
    return table_files(path) if kind == "tables" else _images_below(path, path.resolve())


# Class folders


def read_class_folders(root: Path) -> Records:
    """root/<class>/**.png, or root/train/<class>/... beside root/test (or val).

    Without a test folder a fifth of the files becomes the test set, chosen by a hash of their
    names: adding files moves no other. Links that lead out of the folder are left out.
    """
    root = root.resolve()
    train, test = root, None
    if _subfolders(root / "train"):
        train = root / "train"
        test = next((root / name for name in TEST_NAMES if _subfolders(root / name)), None)
    classes = tuple(folder.name for folder in _subfolders(train))
    if len(classes) < 2:
        raise UserError(
            f"{printable(train)} has {len(classes)} class folder(s), and telling classes apart "
            "takes two: give the folder that holds one subfolder of images per class.",
            code="too-few-classes",
        )
    paths, labels, is_test = [], [], []
    for base in filter(None, (train, test)):
        for folder in _subfolders(base):
            if folder.name not in classes:
                raise UserError(
                    f"the class folder {printable(folder)} has no partner in {printable(train)}: "
                    "training would never see that class; add training images or remove it.",
                    code="class-without-partner",
                )
            found = _images_below(folder, root)
            if not found:
                raise UserError(
                    f"the class folder {printable(folder)} holds no images "
                    f"({', '.join(sorted(SUFFIXES))}; links that lead out of the data set do not "
                    "count): add some or remove the folder.",
                    code="empty-class",
                )
            paths += found
            labels += [classes.index(folder.name)] * len(found)
            is_test += [base == test] * len(found)
    if test is None:
        keys = [os.fsencode(path.relative_to(root).as_posix()) for path in paths]
        is_test = keyed_split(keys, labels)
    return Records(list(paths), [printable(path) for path in paths], labels, is_test, classes)


def keyed_split(keys: Iterable[bytes], labels: Sequence[int]) -> list[bool]:
    """True for the fifth that tests, by a hash of each key; every class keeps one for training."""
    words = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") for key in keys]
    is_test = [word < 2**64 // 5 for word in words]
    members = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    for indices in members.values():
        is_test[max(indices, key=words.__getitem__)] = False
    if not any(is_test):  # a handful of pictures: one of each class that can spare it
        for indices in members.values():
            if len(indices) > 1:
                is_test[min(indices, key=words.__getitem__)] = True
    return is_test


def _subfolders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    root = path.resolve()
    return sorted(
        (
            entry
            for entry in path.iterdir()
            if not entry.name.startswith(".") and entry.is_dir() and _inside(entry, root)
        ),
        key=lambda entry: entry.name,
    )


def _images_below(folder: Path, root: Path) -> list[Path]:
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")  # macOS leaves ._picture.jpg beside picture.jpg
        and path.is_file()
        and _inside(path, root)
    )
    return sorted(found, key=lambda path: path.as_posix())


def _inside(path: Path, root: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root)


# Tables: parquet and arrow files


def table_files(path: Path) -> list[Path]:
    """The parquet files below a path, else the arrow files of `save_to_disk` or the hub's cache."""
    if path.is_file():
        return [path]
    arrow = (p for p in path.rglob("*.arrow") if not p.name.startswith("cache-"))
    return sorted(path.rglob("*.parquet")) or sorted(arrow)


def split_of(relative: Path) -> str:
    """ "train", "test" or "" from a file's name, else from its folders, innermost first."""
    for word in reversed(re.split("[^a-z]+", relative.as_posix().lower())):
        if word == "train" or word in TEST_NAMES:
            return word
    return ""


def read_tables(path: Path) -> Records:
    """Rows of (image, label) from the table files below a path; splits by file or folder name."""
    import pyarrow
    import pyarrow.parquet

    files = table_files(path)
    base = path if path.is_dir() else path.parent
    splits = defaultdict(list)
    folders = set()
    for file in files:
        relative = file.relative_to(base)
        split = split_of(relative)
        folders.add(relative.parent.parent if split_of(relative.parent) else relative.parent)
        try:
            if file.suffix == ".parquet":
                table = pyarrow.parquet.ParquetFile(file).read()
            else:
                with pyarrow.OSFile(str(file)) as source:
                    table = pyarrow.ipc.open_stream(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{printable(file)} is damaged or no table: {error}", code="bad-table"
            ) from None
        splits[split].append(table)
    if len(folders) > 1:
        names = ", ".join(sorted(printable(folder) for folder in folders))
        raise UserError(
            f"{printable(path)} holds several data sets ({names}): give one of them.",
            code="several-data-sets",
        )
    return records_of_tables(dict(splits), printable(path))


def records_of_tables(splits: dict[str, list["pyarrow.Table"]], origin: str) -> Records:
    """Records of tables by split name; image and label columns found by name, else by type."""
    train = splits.pop("train", None) or (splits.popitem()[1] if len(splits) == 1 else None)
    if not train:
        raise UserError(
            f"{origin} has no train split, only {', '.join(map(repr, splits))}.",
            code="no-train-split",
        )
    image, label, classes = _columns(train[0].schema, origin)
    items, raw_labels = _rows(train, image, label, origin)
    is_test = [False] * len(items)
    names = [f"row {row} of train in {origin}" for row in range(len(items))]
    for split in (name for name in TEST_NAMES if name in splits):
        more_items, more_labels = _rows(splits[split], image, label, origin)
        if set(more_labels) <= {-1, None}:  # a competition's test set keeps its labels secret
            continue
        items += more_items
        raw_labels += more_labels
        is_test += [True] * len(more_items)
        names += [f"row {row} of {split} in {origin}" for row in range(len(more_items))]
        break
    if None in raw_labels:
        raise UserError(
            f"{names[raw_labels.index(None)]} has no label in column '{label}'.", code="no-label"
        )
    if classes is None or any(isinstance(value, str) for value in raw_labels):
        for name, value in zip(names, raw_labels, strict=True):
            if not isinstance(value, str) and (value != int(value) or value < 0):
                raise UserError(
                    f"{name} has the label {value} in column '{label}': labels are whole numbers "
                    "from 0, or text; mend the column or drop the row.",
                    code="bad-label",
                )
        values = sorted(set(raw_labels))
        classes = tuple(map(str, values))
        places = {value: place for place, value in enumerate(values)}
        raw_labels = [places[value] for value in raw_labels]
    if not any(is_test):
        keys = (item if isinstance(item, bytes) else os.fsencode(item.name) for item in items)
        is_test = keyed_split(keys, raw_labels)
    return Records(items, names, raw_labels, is_test, classes)


def _columns(schema: "pyarrow.Schema", origin: str) -> tuple[str, str, tuple[str, ...] | None]:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})

    def pick(known: tuple[str, ...], kind: str) -> str:
        typed = [
            name
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == kind
        ]
        for name in (*known, *(typed if len(typed) == 1 else ())):
            if name in schema.names:
                return name
        raise UserError(
            f"{origin} has columns {', '.join(map(printable, schema.names))}; this program needs "
            f"one called {' or '.join(known)} (or a single one of type {kind}).",
            code="no-such-column",
        )

    image = pick(("img", "image"), "Image")
    label = pick(("label", "labels", "fine_label"), "ClassLabel")
    classes = features.get(label, {}).get("names")
    return image, label, tuple(classes) if classes else None


def _rows(
    tables: list["pyarrow.Table"], image: str, label: str, origin: str
) -> tuple[list[bytes | Path], list]:
    import pyarrow
    import pyarrow.compute

    items, labels = [], []
    for table in tables:
        column = table[image]
        if not pyarrow.types.is_struct(column.type):
            items += column.to_pylist()
        else:
            field = {f.name: pyarrow.compute.struct_field(column, f.name) for f in column.type}
            nothing = [None] * len(column)
            blobs = field["bytes"].to_pylist() if "bytes" in field else nothing
            paths = field["path"].to_pylist() if "path" in field else nothing
            items += [
                blob if blob or not path else Path(path)
                for blob, path in zip(blobs, paths, strict=True)
            ]
        labels += table[label].to_pylist()
    for row, item in enumerate(items):
        # A path may name a device or a pipe, which would never end.
        if not (item if isinstance(item, bytes) else isinstance(item, Path) and item.is_file()):
            raise UserError(
                f"row {row} of {origin} has no image in column '{image}'.", code="no-image"
            )
    return items, labels


# CIFAR-10 as published: Python pickles


def read_cifar_batches(path: Path) -> tuple[torch.Tensor, list[int], list[bool]]:
    """The batches folder or archive -> images (N, 3, 32, 32) uint8, labels, is_test.

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
    return torch.from_numpy(np.concatenate(images)), labels, is_test


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
        if any((folder / name).is_file() for name in CIFAR_BATCHES):
            return folder
    return None


def _batch_contents(path: Path) -> list[tuple[str, bytes]]:
    found: dict[str, bytes] = {}
    if folder := path.is_dir() and _batch_folder(path):
        found = {
            name: (folder / name).read_bytes()
            for name in CIFAR_BATCHES
            if (folder / name).is_file()
        }
    else:
        archive = path / CIFAR_ARCHIVE if path.is_dir() else path
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    if member.isreg() and name in CIFAR_BATCHES and member.size < 2**26:
                        found[name] = tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"{printable(archive)} is a damaged archive: {error}", code="bad-archive"
            ) from None
    if missing := [name for name in CIFAR_BATCHES if name not in found]:
        raise UserError(
            f"{printable(path)} lacks {', '.join(missing)} of CIFAR-10.", code="cifar-incomplete"
        )
    return [(name, found[name]) for name in CIFAR_BATCHES]


# Decoding


def decode_all(
    records: Records, image_size: int | None, skip_bad_images: bool
) -> tuple[torch.Tensor, list[int], tuple[str, ...]]:
    """All pictures as one tensor (N, 3, H, W) uint8, the indices kept, and those left out.

    With `image_size` S each becomes S x S: resized so that the shorter side is S, then cropped at
    the centre, unless all of them already are squares of one size up to 64 pixels. A picture that
    cannot be decoded whole, or has more than 89 million pixels, is an error or left out.
    """
    from PIL import Image

    def attempt(chunk: range) -> list[np.ndarray | str]:
        results = []
        for index in chunk:
            try:
                results.append(decode(records.items[index], image_size))
            except Exception as error:  # Pillow raises many kinds on damaged files
                results.append(str(error) or type(error).__name__)
        return results

    kept, arrays, skipped = [], [], []
    chunks = [range(i, min(i + 64, len(records.items))) for i in range(0, len(records.items), 64)]
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # odd metadata, not damaged pixels
        for chunk, results in zip(chunks, pool.map(attempt, chunks), strict=True):
            for index, result in zip(chunk, results, strict=True):
                if not isinstance(result, str):
                    kept.append(index)
                    arrays.append(result)
                    continue
                reason = f"{records.names[index]}: {printable(result).rstrip('.')}"
                if not skip_bad_images:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise UserError(
                        f"cannot decode {reason}. Replace or remove that image, or leave such "
                        "images out with --skip-bad-images.",
                        code="bad-image",
                    )
                skipped.append(reason)
    if not arrays:
        raise UserError(
            f"not one image could be decoded; the first: {[*skipped, 'none there'][0]}",
            code="bad-image",
        )
    height, width, _ = arrays[0].shape
    same = all(array.shape == (height, width, 3) for array in arrays)
    if image_size and not (same and height == width <= SMALL):
        height = width = image_size
    elif not same:
        other = next(array.shape for array in arrays if array.shape != arrays[0].shape)
        raise UserError(
            f"the images differ in size ({width}x{height}, {other[1]}x{other[0]}): say what they "
            "shall become, for example --image-size 64.",
            code="sizes-differ",
        )
    images = np.empty((len(arrays), 3, height, width), dtype=np.uint8)
    for place in range(len(arrays)):
        array, arrays[place] = arrays[place], None  # frees as it goes: half the peak memory
        if array.shape[:2] != (height, width):
            array = np.asarray(square(Image.fromarray(array), image_size))
        images[place] = array.transpose(2, 0, 1)
    return torch.from_numpy(images), kept, tuple(skipped)


def decode(item: bytes | Path, image_size: int | None) -> np.ndarray:
    """One picture as upright RGB (H, W, 3) uint8; larger than 64 pixels: cut to `image_size`."""
    from PIL import Image

    with Image.open(
        io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS
    ) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
        shrink = image_size is not None and max(width, height) > SMALL
        if shrink:
            image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decode at 1/2, 1/4, 1/8
        image.load()
        rgb = upright_rgb(image)
        return np.asarray(square(rgb, image_size) if shrink else rgb)


def upright_rgb(image: "Image.Image") -> "Image.Image":
    """Any mode -> RGB: EXIF rotation applied, transparency laid on white, 16 bit scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        wide = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(wide.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: "Image.Image", size: int) -> "Image.Image":
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
