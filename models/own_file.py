"""A learner's own module: a class in any Python file, named path/to/file.py:ClassName."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.disk import digest, read_json
from common.errors import UserError
from common.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn

CODE = "code"  # in a run folder: the files of an own model
MOST_KEPT = 1_000_000  # bytes of them
OURS = {
    "__main__", "bench", "common", "config", "data", "distributed", "export", "launch",
    "many", "models", "optim", "predict", "report", "tasks", "tests", "train", "training",
}  # fmt: skip
SETTINGS = {".json", ".yaml", ".yml", ".toml", ".ini", ".cfg"}  # that a model's file may read
# What a class must be, by the flag that names it.
BASES = {"--model": "nn.Module", "--loss": "nn.Module", "--optimizer": "torch.optim.Optimizer"}


def is_own_file(name: str) -> bool:
    """Does the name mean a file (with or without its class)?"""
    return name.endswith(".py") or ".py:" in name


_in_memory: dict[str, Callable[[], type[nn.Module]]] = {}


@contextlib.contextmanager
def standing_for(name: str, load: Callable[[], type[nn.Module]]) -> Iterator[None]:
    """Within, path/to/file.py:Class means the class that load() returns, not what the file says."""
    _in_memory[name] = load
    try:
        yield
    finally:
        del _in_memory[name]


def check_own_file(name: str, flag: str = "--model") -> None:
    """UserError unless the file is there, is Python and speaks of the class. Runs nothing."""
    if name in _in_memory:
        return
    path, class_name = _split(name)
    if not path.is_file():
        raise UserError(
            f"{flag} {name}: there is no file {path} (looked in {Path.cwd()})",
            code="no-model-file",
        )
    content = path.read_bytes()
    try:
        statements = ast.parse(content).body  # Python itself knows marks and coding lines
    except SyntaxError as error:
        raise UserError(
            f"{path}, line {error.lineno}: {error.msg}; mend the file", code="bad-model-file"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no Python file: {error}", code="bad-model-file") from None
    classes = [node.name for node in statements if isinstance(node, ast.ClassDef)]
    # A class that the file imports from elsewhere is in its text, though not among its classes.
    if not class_name or class_name.encode() not in content:
        raise _no_such_class(name, classes, flag)


def load_own_class(name: str, flag: str = "--model") -> type:
    """The class, from the file run as a module; its folder is first on sys.path meanwhile."""
    if name in _in_memory:
        return _in_memory[name]()
    path, class_name = _split(name)
    # A prefix of our own, for a file may be called data.py or torch.py.
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up by name
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        line = f", line {frames[-1].lineno}" if frames else ""
        way = ""
        if isinstance(error, ImportError) and "relative import" in str(error):
            way = "; its folder is where imports look: write `from name import ...` without the dot"
        raise UserError(
            f"{path}{line}: the file cannot be imported: {type(error).__name__}: {error}{way}",
            code="bad-model-file",
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        if folder not in sys.path:  # last: for what its functions import when they are called
            sys.path.append(folder)
    found = getattr(module, class_name, None)
    if found is None:
        raise _no_such_class(name, [k for k, v in vars(module).items() if inspect.isclass(v)], flag)
    import torch

    base = torch.optim.Optimizer if flag == "--optimizer" else torch.nn.Module
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(
            f"{flag} {name}: {class_name} is not an {BASES[flag]}; "
            f"write class {class_name}({BASES[flag]}) and call super().__init__() in its __init__",
            code="not-a-module",
        )
    return found


def place_in(name: str, error: BaseException) -> str:
    """'net.py, line 12: ', where an error arose in the file of a model (or one beside it); or ''.

    The innermost such line: torch's own lines say less to who wrote the file.
    """
    if not is_own_file(name):
        return ""
    path = _split(name)[0].resolve()
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent == path.parent
    ]  # fmt: skip
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


# --- the files of a run's model ------------------------------------------------------------------


def sources_of(*names: str) -> dict[str, Path]:
    """The files of what was loaded by these names, by place in each one's folder."""
    found: dict[str, Path] = {}
    for name in filter(is_own_file, names):
        for place, path in _sources_of(name).items():
            if found.setdefault(place, path) != path:
                raise UserError(
                    f"{found[place]} and {path} have one name, and the run folder keeps both: "
                    "rename one",
                    code="two-files",
                )
    return found


def _sources_of(name: str) -> dict[str, Path]:
    """The file of a loaded class and what it imports or names below its folder, by place in there.

    What else the process has loaded from there (a program that calls fit(), another model) is not
    its: the next process would not load it, and the files would seem to have changed.
    """
    path = _split(name)[0].resolve()
    if not path.is_file():
        return {}
    found, todo = {path.name: path}, [("", path)]
    while todo:
        package, source = todo.pop()
        for named in _settings_beside(source):
            found[named.relative_to(path.parent).as_posix()] = named
        for module_name in _imported(package, source):
            file = getattr(sys.modules.get(module_name), "__file__", None)
            if not file or not file.endswith(".py") or module_name.partition(".")[0] in OURS:
                continue
            place = Path(file).resolve()
            installed = any(place.is_relative_to(p) for p in {sys.prefix, sys.base_prefix})
            real = place.is_file() and "site-packages" not in file  # torch has some without a file
            if not real or installed or not place.is_relative_to(path.parent):
                continue
            if place not in found.values():
                found[place.relative_to(path.parent).as_posix()] = place
                is_package = place.name == "__init__.py"
                todo.append((module_name if is_package else module_name.rpartition(".")[0], place))
    return dict(sorted(found.items()))


def _imported(package: str, file: Path) -> set[str]:
    """Every module that a file of a package names in an import, at whatever depth it stands."""
    names: set[str] = set()
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # edited since it was loaded
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:  # importlib.import_module("parts.inner")
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                names.add(str(first.value))
    return {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}


def _settings_beside(file: Path) -> set[Path]:
    """The files of settings in or below a file's folder that its code names: "net.json".

    What a script does besides (`if __name__ == "__main__"`), with results that it writes, is none
    of the model's.
    """
    try:
        statements = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):  # edited since it was loaded
        return set()
    found = set()
    for statement in statements:
        if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
            continue
        for node in ast.walk(statement):
            text = getattr(node, "value", "") if isinstance(node, ast.Constant) else ""
            if not isinstance(text, str) or Path(text).suffix.lower() not in SETTINGS:
                continue
            with contextlib.suppress(OSError, ValueError):  # a name that no file can have
                beside = (file.parent / text).resolve()
                if beside.is_file() and beside.is_relative_to(file.parent):
                    found.add(beside)
    return found


def digests_of(*names: str) -> dict[str, str]:
    """Place below its folder -> hash, of every file that makes an own class; {} of others.

    The model is loaded by now, and was tried: what it imports late is known. A class in memory is
    not its file, in which values stand that change while it trains.
    """
    files = sources_of(*(name for name in names if name not in _in_memory))
    return {place: digest(path.read_bytes()) for place, path in files.items()}


def keep_code(folder: Path, *names: str) -> str:
    """Copy the files of own classes into a run folder; what cannot be kept, in a sentence.

    Files of an earlier life that differ stay beside them: older weights may need them.
    """
    inside = [n for n in names if _split(n)[0].resolve().is_relative_to(folder.resolve())]
    outside = [n for n in names if n not in inside]  # a class of fit() is kept already
    files, target = sources_of(*outside), folder / CODE
    if not files or holds(target, digests_of(*outside)):
        return ""
    size = sum(path.stat().st_size for path in files.values())
    if size > MOST_KEPT:
        return (
            f"the files of {names[0]} are {size / 1e6:.1f} MB: the run folder keeps no copy of "
            f"more than {MOST_KEPT / 1e6:.0f} MB, and predict.py will need them where they are"
        )
    if target.exists() and not inside:
        number = 1 + sum(1 for _ in folder.glob(f"{CODE}.old-*"))
        target.rename(folder / f"{CODE}.old-{number}")
    for place, path in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / place)
    return ""


def code_of_weights(name: str, digests: dict[str, str], folder: Path, trust: bool = False) -> str:
    """FILE.py:Class to execute for weights in a folder, which were made by files of these hashes.

    The file where it was, if it did not change, else the copy that the run keeps. Weights alone
    bring no code: they, and a file that they name, may come from anyone. Without `trust` a file is
    executed for a run folder of one's own only. Raises UserError.
    """
    path, made = _split(name)
    if not trust:
        refuse_foreign_code(name, folder)
    places = [path.parent, folder / CODE, *sorted(folder.glob(f"{CODE}.old-*"))]
    for place in places:
        if holds(place, digests) if digests else (place / path.name).is_file():
            return f"{place / path.name}:{made}"
    lack = "has changed since" if path.is_file() else "is gone"
    raise UserError(
        f"{path}, which made these weights, {lack}, and {folder / CODE} holds no copy of it as it "
        "was; bring that file back, with the files beside it that it imports",
        code="no-model-file",
    )


def refuse_foreign_code(name: str, folder: Path) -> None:
    """UserError unless this is a run folder of one's own."""
    why = ""
    if "config" not in read_json(folder / "config.json", {}):  # a folder of the hub has another
        why = f"{folder} is no run folder, and weights alone bring no code"
    elif not _is_mine(folder):
        why = f"{folder} belongs to somebody else"
    if why:
        raise UserError(
            f"these weights want to execute {_split(name)[0]}: {why}; read that file, and if you "
            "trust it add --trust-code",
            code="untrusted-code",
        )


def holds(folder: Path, digests: dict[str, str]) -> bool:
    """Whether all these files are in a folder, with these hashes."""
    try:
        return bool(digests) and all(
            digest((folder / place).read_bytes()) == value for place, value in digests.items()
        )
    except OSError:
        return False


def _is_mine(folder: Path) -> bool:
    """Whether the user who runs this owns a folder and the code in it (where systems know that)."""
    if not hasattr(os, "geteuid"):
        return True
    places = [folder, *(p for p in folder.glob(f"{CODE}*/**/*")), *folder.glob(f"{CODE}*")]
    return all(place.stat().st_uid == os.geteuid() for place in places)


def call_with_known_arguments(
    make: Callable[..., nn.Module], known: Mapping[str, float], name: str
) -> nn.Module:
    """make(**the known arguments that it takes); UserError if it needs others."""
    parameters = inspect.signature(make).parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in known
    ]
    if needed:
        raise UserError(
            f"--model {name}: __init__ needs {', '.join(needed)}, which nobody gives; "
            f"write a default (def __init__(self, num_classes, {needed[0]}=...)); "
            "only num_classes and image_size are passed (and drop_path, or in_channels with "
            "--channels, where they are asked for)",
            code="unknown-argument",
        )
    try:
        return make(**{key: value for key, value in known.items() if key in parameters})
    except UserError:
        raise
    except Exception as error:  # whatever a learner's __init__ may raise
        if not (place := place_in(name, error)):
            raise
        raise UserError(
            f"--model {name}: its __init__ fails: {place}{type(error).__name__}: {error}",
            code="model-fails",
        ) from error


def about_channels(channels: int) -> str:
    """What to do where a model does not take images of so many channels, to follow its error."""
    if channels == 3:
        return ""
    return f"; with --channels {channels} its first layer has to take in_channels={channels}"


def size_lazy_layers(model: nn.Module, image_size: int, name: str, channels: int = 3) -> None:
    """Give nn.LazyLinear and its kin their sizes by two blank images (channels, size, size)."""
    import torch
    from torch.nn.parameter import is_lazy

    if not any(is_lazy(p) for p in model.parameters()):
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, channels, image_size, image_size))
    except Exception as error:
        message = place_in(name, error) + str(error).splitlines()[0]
        raise UserError(
            f"--model {name}: fails on two images of {image_size}: {message}"
            f"{about_channels(channels)}",
            code="model-fails",
        ) from error
    model.train()


def _split(name: str) -> tuple[Path, str]:
    path, _, class_name = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    return Path(path).expanduser(), class_name


def _no_such_class(name: str, classes: list[str], flag: str) -> UserError:
    path, class_name = _split(name)
    hint = did_you_mean(class_name, classes)
    given = f"there is no class {class_name} in the file{hint}" if class_name else "name a class"
    listed = f"it has {', '.join(classes)}" if classes else "it has no class at all"
    return UserError(
        f"{flag} {name}: {given}; {listed}; type {path}:ClassName", code="unknown-class"
    )
