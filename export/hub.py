"""A folder as the Hugging Face hub has models, with a card; uploaded only where that is asked."""

import inspect
import os
import re
import shutil
from keyword import iskeyword
from pathlib import Path

from common.disk import Json, write_json, write_text
from common.errors import UserError
from common.reach import unreached
from common.text import printable
from models import parts_of
from models.own_file import CODE, is_own_file, load_own_class

REACH_SECONDS = 4.0
COMPILED = "*__pycache__*"  # of who tried the folder: it names the folders of this machine
CARD = "README.md"


def write_folder(folder: Path, description: dict[str, Json], card: dict, built: str) -> str:
    """config.json, the card and an own model's files, beside model.safetensors.

    A card that is there already, with a licence by now, is kept. Returns what to tell of it.
    """
    classes = card["classes"]
    write_json(folder / "config.json", {
        "architectures": [card["model"].rpartition(":")[2]], "num_labels": len(classes),
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)}, **description,
    })  # fmt: skip
    if is_own_file(built):
        keep_own_code(folder / CODE, card, Path(built.rpartition(":")[0]))
    if (folder / CARD).exists():
        return f"{CARD} was there and is kept as it is"
    write_text(folder / CARD, model_card(description, card, built))
    return f"{CARD}: read it, and choose a licence"


def keep_own_code(target: Path, card: dict, file: Path) -> None:
    """The files of the model's class, as the run executed them."""
    for place in card.get("code") or {file.name: ""}:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.parent / place, target / place)


def as_code(text: str) -> str:
    """A name as a Markdown code span, whatever it holds: its fence is longer than any inside."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{room}{text}{room}{fence}"


def as_words(text: str) -> str:
    """A name in a Markdown sentence or table, where none of its characters is markup."""
    return re.sub(r"([\\`*\[\]<>|~&])|((?<!\w)_|_(?!\w))", r"\\\1\2", printable(text))


def model_card(description: dict, card: dict, built: str) -> str:
    """The model card: what it is, what it was trained on, how good it is, how to load it."""
    classes, metrics = card["classes"], description["metrics"]
    shown = ", ".join(as_code(name) for name in classes[:100])
    if len(classes) > 100:
        shown += f" and {len(classes) - 100} more (all of them in config.json)"
    numbers = "".join(f"| {as_words(name)} | {value:.4g} |\n" for name, value in metrics.items())
    table = (
        f"| on the test pictures | |\n|---|---|\n{numbers}" if numbers else "No metrics known.\n"
    )
    steps = "".join(f"{n}. {printable(s)}\n" for n, s in
                    enumerate(description["preprocessing"]["steps"], 1))  # fmt: skip
    words = "averaged weights" if description["averaged"] else "weights"
    own = is_own_file(built)
    trust = " --trust-code" if own else ""
    about = f"{as_words(description['model'])} for {len(classes)} classes of images"
    if description["dataset"]:
        about += f", trained on {as_words(description['dataset'])} by Lockstep"
    mean, std = (", ".join(f"{value:.6g}" for value in card[name]) for name in ("mean", "std"))
    return f"""---
pipeline_tag: image-classification
tags:
- image-classification
- lockstep
# license: choose one (https://huggingface.co/docs/hub/repositories-licenses)
---

# {as_words(description["run"])}

{about}. These are its {description["weights"]} {words}, of step {description["step"]}.

## Metrics

{table}
## Classes

{shown}

## Preprocessing

{steps}{len(steps.splitlines()) + 1}. subtract the mean ({mean}),
   divide by the standard deviation ({std})

## How to load it

`python predict.py PICTURE.png --run FOLDER{trust}` in a clone of Lockstep, or:

```python
{loading(card, built)}```

## Data, licence, limits

To be written by who publishes it: where the pictures come from, what may be done with the model,
and where it fails.
"""


def loading(card: dict, built: str) -> str:
    """Python that builds the plain architecture and gives it the weights."""
    given = {"num_classes": len(card["classes"]), "image_size": card["image_size"]}
    given |= parts_of(card)
    lines = ["from safetensors.torch import load_file", ""]
    if is_own_file(built):
        file, _, name = built.rpartition(":")
        takes = inspect.signature(load_own_class(built)).parameters
        if "channels" in given:
            given |= dict.fromkeys(("in_channels", "in_chans"), given.pop("channels"))
        words = ", ".join(f"{key}={value!r}" for key, value in given.items() if key in takes)
        stem = Path(file).stem
        lines = ["import sys", "", *lines, f'sys.path.insert(0, "{CODE}")  # read it first']
        called = f"from {stem} import {name}"
        if not stem.isidentifier() or iskeyword(stem):  # python says import to no such name
            lines.insert(0, "import importlib")
            called = f'{name} = importlib.import_module("{stem}").{name}'
        lines += [called, "", f"model = {name}({words})"]
    else:
        words = ", ".join(f"{key}={value!r}" for key, value in given.items())
        lines += ["from models import build_model  # in a clone of Lockstep", ""]
        lines += [f'model = build_model("{card["model"]}", {words})']
    lines += ['model.load_state_dict(load_file("model.safetensors"))', "model.eval()"]
    return "\n".join(lines) + "\n"


def upload(folder: Path, repository: str) -> str:
    """Put the folder into a repository of the hub, a new one as private; returns its address.

    Raises UserError within seconds where the hub is out of reach or refuses.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    kept = f"the folder {folder} is complete: hf upload {repository} {folder} sends it later"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"--upload {repository}: HF_HUB_OFFLINE is set; {kept}", code="hub-offline")
    if why := unreached(endpoint, REACH_SECONDS):
        raise UserError(f"--upload {repository}: {why}; {kept}", code="hub-unreached")
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(
            f"--upload {repository}: there is no token; type hf auth login, or set HF_TOKEN; "
            f"{kept}",
            code="hub-token",
        )
    try:
        api = HfApi(endpoint=endpoint)
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="From Lockstep",
            ignore_patterns=COMPILED,
        )  # fmt: skip
    except Exception as error:  # whatever the hub or the way to it answers
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--upload {repository}: {why}; {kept}", code="hub-refuses") from error
    return f"{endpoint}/{repository}"
