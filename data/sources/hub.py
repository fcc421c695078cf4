"""The Hugging Face hub: a copy in its caches, whether it can be reached, and what it gives."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common.errors import UserError
from common.text import printable
from data.files import Records
from data.sources.layout import Aside
from data.sources.tables import Placed, read_tables, records_of_tables, split_of, table_files
from data.splits import AS_IT_IS, Wanted, split_word

PATIENCE = 4.0  # seconds; a blocked name resolution would otherwise take minutes


def reach(repository: str) -> tuple[bool, str]:
    """Whether the hub offers it to this user now, and why not: half a sentence."""
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
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        why = f"no answer in {PATIENCE:.0f} seconds"
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


def folder_of(repository: str) -> Path | None:
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
        found = table_files(folder)
        splits = {split_of(path.relative_to(folder)) for path in found}
        numbered = (re.match(r"(.*)-\d+-of-(\d+)", str(path)) for path in found)
        parts = Counter(match.groups() for match in numbered if match)
        # An interrupted download lacks a split or a numbered part.
        whole = all(count == int(total) for (_, total), count in parts.items())
        if whole and "train" in splits and len(splits) > 1:
            return folder
    return None


def read_records(repository: str, wanted: Wanted = AS_IT_IS, aside: Aside | None = None) -> Records:
    """The rows of all splits of a data set on the hub, or in its local cache."""
    if folder := folder_of(repository):
        return read_tables(folder, wanted, aside)
    from datasets import load_dataset

    try:
        splits = load_dataset(repository)
    except Exception as error:  # network, disk, several configurations, unknown formats
        first_line = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"the hub's {repository} cannot be loaded: {first_line}", code="hub-refused"
        ) from None
    if folder := folder_of(repository):  # now it is: arrow files, which are read where they lie
        return read_tables(folder, wanted, aside)
    tables = defaultdict(list)
    for split, part in splits.items():
        table = part.data.table.replace_schema_metadata(part.features.arrow_schema.metadata)
        tables[split_word(str(split)) or str(split)].append(Placed(table, None))
    return records_of_tables(dict(tables), f"the hub's {repository}", wanted)
