"""What there is for the rows: devices, and place on the disk."""

import os
import shutil

from config import parse
from config.rows import Rows
from many.folder import Turn


def devices_there() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may say for one process each; nothing without GPUs."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


def disk_in_words(rows: Rows, left: list[Turn], beside: int) -> str:
    """About how much the rows need, and what there is. Warns by itself where it is too little."""
    models = {
        tuple(turn.row.values.get(name) for name in ("model", "image_size")): rows.words(turn.row)
        for turn in left
    }
    sizes = [size for words in models.values() if (size := _size(words))]
    if not sizes:
        return ""
    weights = sum(sizes) / len(sizes)
    checkpoint = 3 * weights  # weights and what an optimizer keeps, at most
    kept = (2 * weights + 3 * checkpoint) if rows.keep else weights
    need = len(left) * kept + beside * (2 * weights + 4 * checkpoint)
    free = shutil.disk_usage(rows.folder).free
    what = "weights and checkpoints" if rows.keep else "best weights only (--keep 3: checkpoints)"
    short = "TOO LITTLE: " if need > free else ""
    return f"{short}about {need / 1e9:.2g} GB of {free / 1e9:.3g} GB free; {what}"


def _size(words: list[str]) -> int:
    """Bytes of a row's weights, with a head of ten classes; 0 where it cannot be told."""
    import torch

    from models import build_from

    try:
        config = parse(words).config
        with torch.device("meta"):
            model = build_from(vars(config), 10)
    except Exception:  # a class of the user's that no tensor without numbers suits
        return 0
    return sum(4 * value.numel() for value in model.state_dict().values())
