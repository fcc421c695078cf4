"""Where the pictures come from: a named data set, a folder, tables or the hub -> tensors."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common.disk import digest
from common.text import nearest, printable
from data import files
from data.cache import Entry, cache_dir, cached, digest_of, entry_path, read_entry, write_entry
from errors import UserError

__all__ = ["DATASETS", "ImageSet", "Source", "cache_dir", "choose_dataset", "load_source"]

DATASETS = {
    "auto": "cifar10 if it can be had, else digits",
    "cifar10": "CIFAR-10: 60,000 photographs, 32x32, 10 classes (local copy or Hugging Face hub)",
    "digits": "scikit-learn's handwritten digits: 1,797 images, 8x8, no download",
    "synthetic": "made-up learnable images: 2,560, 32x32, 10 classes, no download",
    "line": "thirty points of y = 2x + 3 with a little noise, for linear regression",
    "folder": "your own images in --data-dir, one subfolder per class",
}
CIFAR10_HUB_NAME = "uoft-cs/cifar10"
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PATIENCE = 4.0  # seconds; a blocked name resolution would otherwise take minutes


@dataclass(frozen=True)
class ImageSet:
    """images (N, 3, H, W) uint8 and labels (N,) int64; regression: (N, F) and (N, 1) float32."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def limited(images: ImageSet, limit: int) -> ImageSet:
    """So many of the images, 0: all; evenly spread, for they may lie in the order of classes."""
    if not limit or limit >= len(images):
        return images
    spread = torch.arange(limit) * len(images) // limit
    return ImageSet(images.images[spread], images.labels[spread])


@dataclass(frozen=True)
class Source:
    """A data set in memory. `mean` and `std` are those of the training images, in 0..1."""

    name: str
    task: str  # "classification" or "regression"
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str  # of classes, shapes, labels and pixels
    origin: str  # a sentence
    skipped: tuple[str, ...] = ()  # images left out, with the reason
    no_flip: bool = False  # mirrored digits are no digits


def choose_dataset(dataset: str, data_dir: str | None = None) -> tuple[str, str]:
    """The name to load and a sentence about it; looks at disk and network, so ask one process.

    Raises UserError for a name nobody knows, and for a named data set that cannot be had.
    """
    if dataset == "auto":
        return _choose_automatically(data_dir)
    if dataset in ("digits", "synthetic", "line"):
        return dataset, f"Data: {DATASETS[dataset]}."
    kind, where = _locate(dataset, data_dir)
    if kind == "hub":
        reached, why = _hub_has(dataset, where)
        if not reached:
            raise UserError(
                f"{_cannot_be_had(dataset, why)} {_what_to_type(dataset)}", code="data-unreachable"
            )
    return dataset, _origin(dataset, kind, where)


def load_source(
    name: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
) -> Source:
    """Load a data set by name or path, from the cache when it was decoded before.

    Safe to call from all processes of a node at once: one decodes, the others wait for its file.
    `image_size` applies to folders and tables (see `files.decode_all`), `seed` to `line` alone.
    """
    if name == "line":
        return _line(seed)
    if name in ("digits", "synthetic"):
        tensors, meta = _describe(*(_digits() if name == "digits" else _synthetic()))
        origin = f"Data: {DATASETS[name]}."
    else:
        kind, where = _locate(name, data_dir)
        if name == "cifar10":
            image_size = None  # its pictures share one small size
        if kind == "tensors":
            tensors, meta = _carried(name, Path(where), image_size)
        else:
            key = _key(name, kind, where, image_size, skip_bad_images)
            tensors, meta = cached(
                key, lambda: build(name, kind, where, image_size, skip_bad_images)
            )
        origin = _origin(name, kind, where)
    return Source(
        name=name,
        task="classification",
        train=ImageSet(tensors["train_images"], tensors["train_labels"]),
        test=ImageSet(tensors["test_images"], tensors["test_labels"]),
        classes=tuple(meta["classes"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=meta["fingerprint"],
        origin=origin,
        skipped=tuple(meta["skipped"]),
        no_flip=name == "digits",
    )


def save_source(source: Source, path: Path, image_size: int | None) -> None:
    """All of a data set in one checksummed file, which takes its place where a path is asked for.

    It needs no decoder and none of the packages that read tables. image_size is what the pictures
    were decoded for.
    """
    if source.name in ("digits", "synthetic", "line"):
        raise UserError(
            f"{source.name} needs no file, it is made where it is used; --out is for cifar10, "
            "a folder, tables or a hub name",
            code="needs-no-file",
        )
    tensors = {"train_images": source.train.images, "train_labels": source.train.labels}
    tensors |= {"test_images": source.test.images, "test_labels": source.test.labels}
    names = ("name", "classes", "mean", "std", "fingerprint", "skipped")
    meta = {name: getattr(source, name) for name in names} | {"image_size": image_size}
    if not write_entry(path, tensors, meta):
        raise UserError(
            f"{printable(path)} cannot be written; try --out data.safetensors",
            code="output-unwritable",
        )


def _carried(name: str, path: Path, image_size: int | None) -> Entry:
    entry = read_entry(path)
    if entry is None or "image_size" not in entry[1]:
        raise UserError(
            f"{printable(path)} is damaged or no data set of this program: make it with "
            "python -m data prepare --out FILE.safetensors",
            code="bad-data-file",
        )
    tensors, meta = entry
    if name == "cifar10" and meta["name"] != "cifar10":
        raise UserError(
            f"what lies in {printable(path)} is not CIFAR-10; type --dataset {printable(path)} to "
            "train on it.",
            code="not-cifar10",
        )
    side = tensors["train_images"].shape[-1]
    decoded = side > 64 or side == meta["image_size"]  # smaller ones may be as they came
    if meta["name"] != "cifar10" and decoded and image_size not in (None, side):
        raise UserError(
            f"the pictures in {printable(path)} were decoded for --image-size {side}: type that, "
            f"or make another with python -m data prepare --image-size {image_size} --out FILE",
            code="other-image-size",
        )
    return {key: tensor.clone() for key, tensor in tensors.items()}, meta  # no longer of the file


def build(name: str, kind: str, where: str, image_size: int | None, skip_bad: bool) -> Entry:
    """Read and decode a data set that is not in the cache."""
    skipped: tuple[str, ...] = ()
    if kind in ("batches", "archive"):
        images, labels, is_test = files.read_cifar_batches(Path(where))
        classes = CIFAR10_CLASSES
    else:
        if kind == "hub":
            records = _read_hub(where)
        elif kind == "tables":
            records = files.read_tables(Path(where))
        else:
            records = files.read_class_folders(Path(where))
        images, kept, skipped = files.decode_all(records, image_size, skip_bad)
        labels = [records.labels[index] for index in kept]
        is_test = [records.is_test[index] for index in kept]
        classes = records.classes
    if name == "cifar10":
        if images.shape[1:] != (3, 32, 32) or len(classes) > 10:
            raise UserError(
                f"what lies at {printable(where)} is not CIFAR-10: {len(classes)} classes, images "
                f"of {tuple(images.shape[1:])}; type --dataset {printable(where)} to train on it.",
                code="not-cifar10",
            )
        if classes == tuple(map(str, range(len(classes)))):  # a table that does not name them
            classes = CIFAR10_CLASSES
    labels, is_test = torch.tensor(labels), torch.tensor(is_test)
    train = (images[~is_test], labels[~is_test])
    test = (images[is_test], labels[is_test])
    _check(labels, is_test, classes, printable(where))
    return _describe(train, test, classes, skipped)


def _check(labels: torch.Tensor, is_test: torch.Tensor, classes: tuple[str, ...], at: str) -> None:
    if len(classes) < 2:
        raise UserError(
            f"{at} has {len(classes)} class(es): telling classes apart takes two.",
            code="too-few-classes",
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{at} has labels from {labels.min()} to {labels.max()}, but {len(classes)} classes: "
            f"labels must lie in 0..{len(classes) - 1}; mend the label column.",
            code="bad-label",
        )
    for split, there in (("training", ~is_test), ("test", is_test)):
        if not there.any():
            raise UserError(
                f"{at} has no {split} images that can be read: add some.", code="empty-split"
            )


def _describe(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    classes: tuple[str, ...],
    skipped: tuple[str, ...] = (),
) -> Entry:
    tensors = {
        "train_images": train[0],
        "train_labels": train[1],
        "test_images": test[0],
        "test_labels": test[1],
    }
    mean, std = _mean_and_std(train[0])
    checksums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    fingerprint = _fingerprint(classes, checksums)
    facts = {"classes": classes, "mean": mean, "std": std, "skipped": skipped}
    return tensors, {**facts, "fingerprint": fingerprint}


def _fingerprint(classes: tuple[str, ...], checksums: dict[str, str]) -> str:
    return digest(json.dumps([classes, checksums]))


def _mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per channel of uint8 (N, 3, H, W), in 0..1; from exact counts, so the same on any machine."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256)
        share = counts / counts.sum().double()
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]).square()).sum().item()
        std.append(max(variance**0.5, 1 / 255))  # a channel without contrast must not divide by 0
    return mean, std


# Data sets made on the spot


def _digits() -> tuple:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy((digits.images * (255 / 16)).round()).to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):  # every fifth of each digit
        is_test[(labels == digit).nonzero().flatten()[4::5]] = True
    classes = tuple(map(str, range(10)))
    return (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test]), classes


def _synthetic() -> tuple:
    """Ten patterns of 4x4 blocks, and noise; the same pictures for every seed of a run."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(64, 192, (10, 3, 4, 4), generator=generator)
    patterns = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = torch.arange(2048 + 512) % 10
    noise = torch.randint(-64, 64, (len(labels), 3, 32, 32), generator=generator)
    images = (patterns[labels] + noise).to(torch.uint8)
    classes = tuple(f"pattern {number}" for number in range(10))
    return (images[:2048], labels[:2048]), (images[2048:], labels[2048:]), classes


def _line(seed: int) -> Source:
    generator = torch.Generator().manual_seed(seed)
    x = -10 + 20 * torch.arange(30, dtype=torch.float32)[:, None] / 30
    y = 2 * x + 3 + torch.randint(0, 3, (30, 1), generator=generator)
    points = ImageSet(x, y)
    return Source(
        name="line",
        task="regression",
        train=points,
        test=points,
        classes=(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        fingerprint=_fingerprint((), {"x": digest_of(x), "y": digest_of(y)}),
        origin=f"Data: {DATASETS['line']}.",
    )


# Finding a data set


def _locate(name: str, data_dir: str | None) -> tuple[str, str]:
    """(layout of files.py, absolute path) of a local data set, or ("hub", its name there)."""
    if name == "cifar10":
        local = data_dir or os.environ.get("CIFAR10_DIR")
        if not local:
            return "hub", CIFAR10_HUB_NAME
        path = _existing(local, "--data-dir" if data_dir else "the variable CIFAR10_DIR")
        kind = files.layout(path)
        if kind == "folder":
            raise UserError(
                f"{printable(path)} holds class folders, not a copy of CIFAR-10; to train on them "
                f"type --dataset {printable(path)}.",
                code="not-cifar10",
            )
        return kind, str(path)
    if name == "folder":
        if not data_dir:
            raise UserError(
                "--dataset folder needs --data-dir FOLDER, one subfolder per class.",
                code="no-data-dir",
            )
        path = _existing(data_dir, "--data-dir")
        return files.layout(path), str(path)
    path = Path(name).expanduser()
    if path.exists():
        return files.layout(path), str(path.absolute())
    if HUB_NAME.fullmatch(name) and not name.startswith("."):
        return "hub", name
    if os.sep in name or "/" in name:
        raise UserError(
            f"there is no folder or file {printable(name)}: check the path.", code="no-such-path"
        )
    close = nearest(name.lower(), DATASETS)
    raise UserError(
        f"there is no data set '{printable(name)}'{f'; did you mean {close}?' if close else '.'}"
        f" Known: {', '.join(DATASETS)}, the path of a folder, or a hub name like user/name.",
        code="unknown-data-set",
    )


def _existing(path: str, said_by: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(
            f"{said_by} names {printable(path)}, which does not exist: check the path.",
            code="no-such-path",
        )
    return found.absolute()


def _choose_automatically(data_dir: str | None) -> tuple[str, str]:
    if data_dir and files.layout(_existing(data_dir, "--data-dir")) == "folder":
        return choose_dataset(data_dir)
    kind, where = _locate("cifar10", data_dir)
    if kind == "hub":
        reached, why = _hub_has("cifar10", where)
        if not reached:
            return "digits", (
                f"{_cannot_be_had('cifar10', why)} This run takes scikit-learn's 8x8 digits "
                f"instead. {_what_to_type('cifar10')}"
            )
    return "cifar10", _origin("cifar10", kind, where)


def _cannot_be_had(name: str, why: str) -> str:
    return f"{printable(name)} cannot be had: there is no local copy, and {why}."


def _what_to_type(name: str) -> str:
    if name == "cifar10":
        return (
            "With a copy of CIFAR-10 type --dataset cifar10 --data-dir FOLDER (or set CIFAR10_DIR)."
        )
    return f"With a copy on disk type --dataset FOLDER; '{printable(name)}' is no folder here."


def _origin(name: str, kind: str, where: str) -> str:
    if kind == "hub":
        return f"Data: {printable(where)} from the Hugging Face hub."
    names = {"batches": "Python batches", "archive": "the archive", "tensors": "decoded tensors"}
    what = "tables" if kind == "tables" else names.get(kind, "class folders")
    label = "CIFAR-10" if name == "cifar10" else "images"
    return f"Data: {label} from {what} at {printable(where)}."


def _key(name: str, kind: str, where: str, image_size: int | None, skip_bad: bool) -> list:
    """What a cached entry depends on; a hub data set is kept as it was first fetched."""
    status = []
    if kind != "hub":
        found = [(path, path.stat()) for path in files.source_files(Path(where), kind)]
        status = [(str(path), seen.st_size, seen.st_mtime_ns) for path, seen in found]
    return [name == "cifar10", kind, where, image_size, skip_bad, status]


# The Hugging Face hub


def _hub_has(name: str, repository: str) -> tuple[bool, str]:
    """Can this data set be had from a cache or the hub, and why not: half a sentence."""
    if name == "cifar10" and entry_path(_key(name, "hub", repository, None, False)).exists():
        return True, ""
    return (True, "") if _hub_folder(repository) else _reach_hub(repository)


def _reach_hub(repository: str) -> tuple[bool, str]:
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return False, f"{variable} is set, so the Hugging Face hub is not asked"
    question = (
        "import sys; from huggingface_hub import HfApi\n"
        "try: HfApi().dataset_info(sys.argv[1])\n"
        "except Exception as error: sys.exit(type(error).__name__)"
    )
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", question, repository],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HUB_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        why = f"no answer in {HUB_PATIENCE:.0f} seconds"
    else:
        if answer.returncode == 0:
            return True, ""
        why = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        if "NotFound" in why or "Gated" in why:
            return False, f"the Hugging Face hub does not offer it to you ({printable(why)})"
    return False, (
        f"the Hugging Face hub cannot be reached ({printable(why)}; HTTPS_PROXY sets a proxy, "
        "HF_ENDPOINT a mirror, HF_HUB_OFFLINE=1 skips the attempt)"
    )


def _hub_folder(repository: str) -> Path | None:
    """The complete copy that an earlier download left in the hub's own caches, if any."""
    environment = os.environ
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(environment.get("HF_HOME") or f"{base}/huggingface").expanduser()
    tables = Path(environment.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    done = (tables / repository.replace("/", "___")).glob("*/*/*/dataset_info.json")
    downloads = Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser()
    snapshots = downloads / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    candidates = [path.parent for path in done] + [p for p in snapshots.glob("*") if p.is_dir()]
    for folder in sorted(candidates, key=lambda path: path.stat().st_mtime, reverse=True):
        found = files.table_files(folder)
        splits = {files.split_of(path.relative_to(folder)) for path in found}
        numbered = (re.match(r"(.*)-\d+-of-(\d+)", str(path)) for path in found)
        parts = Counter(match.groups() for match in numbered if match)
        # An interrupted download lacks a split or a numbered part.
        whole = all(count == int(total) for (_, total), count in parts.items())
        if whole and "train" in splits and len(splits) > 1:
            return folder
    return None


def _read_hub(repository: str) -> files.Records:
    if folder := _hub_folder(repository):
        return files.read_tables(folder)
    reached, why = _reach_hub(repository)
    if not reached:
        raise UserError(
            f"{_cannot_be_had(repository, why)} {_what_to_type(repository)}",
            code="data-unreachable",
        )
    from datasets import load_dataset

    try:
        splits = load_dataset(repository)
    except Exception as error:  # network, disk, several configurations, unknown formats
        first_line = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"the hub's {repository} cannot be loaded: {first_line}", code="hub-refused"
        ) from None
    tables = {
        split: [part.data.table.replace_schema_metadata(part.features.arrow_schema.metadata)]
        for split, part in splits.items()
    }
    return files.records_of_tables(tables, f"the hub's {repository}")
