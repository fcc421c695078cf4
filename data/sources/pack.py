"""A pack of photographs, made by `python -m data prepare --out FOLDER`."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from common.text import printable
from data.cache import Entry
from data.pack import is_pack, open_pack
from data.sources.layout import Layout
from data.sources.published import Published


def read(path: Path, image_size: int | None, known: Mapping[str, Published], name: str) -> Entry:
    """The index of a pack; a published data set is none of photographs."""
    if name in known:
        raise UserError(
            f"what lies at {printable(path)} is not {known[name].title} but a pack of photographs; "
            f"type --dataset {printable(path)} to train on it.",
            code="other-data-set",
        )
    return open_pack(path, image_size)


PACK = Layout("a pack", is_pack, entry=read)
