"""A learner's own module: a class in any Python file, named path/to/file.py:ClassName."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.text import did_you_mean
from errors import UserError


def is_own_file(name: str) -> bool:
    """Does the name mean a file (with or without its class)?"""
    return name.endswith(".py") or ".py:" in name


_in_memory: dict[str, Callable[[], type]] = {}


@contextlib.contextmanager
def standing_for(name: str, load: Callable[[], type]) -> Iterator[None]:
    """Within, path/to/file.py:Class means the class that load() returns, not what the file says."""
    _in_memory[name] = load
    try:
        yield
    finally:
        del _in_memory[name]


def check_own_file(name: str) -> None:
    """UserError unless the file is there, is Python and speaks of the class. Runs nothing."""
    if name in _in_memory:
        return
    path, class_name = _split(name)
    if not path.is_file():
        raise UserError(
            f"--model {name}: there is no file {path} (looked in {Path.cwd()})",
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
        raise _no_such_class(name, classes)


def load_own_class(name: str) -> type:
    """The class, from the file run as a module; its folder is on sys.path meanwhile."""
    if name in _in_memory:
        return _in_memory[name]()
    path, class_name = _split(name)
    # A prefix of our own, for a file may be called data.py or torch.py.
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up by name
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise UserError(
            f"{path}{line}: the file cannot be imported: {type(error).__name__}: {error}",
            code="bad-model-file",
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    found = getattr(module, class_name, None)
    if found is None:
        raise _no_such_class(name, [k for k, v in vars(module).items() if inspect.isclass(v)])
    from torch import nn

    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(
            f"--model {name}: {class_name} is not an nn.Module; "
            f"write class {class_name}(nn.Module) and call super().__init__() in its __init__",
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


def call_with_known_arguments(make: Callable, known: dict[str, Any], name: str) -> Any:
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
            "only num_classes and image_size are passed",
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


def size_lazy_layers(model: Any, image_size: int, name: str) -> None:
    """Give nn.LazyLinear and its kin their sizes by two blank images of (3, image_size, ...)."""
    import torch
    from torch.nn.parameter import is_lazy

    if not any(is_lazy(p) for p in model.parameters()):
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"--model {name}: fails on two images of {image_size}: {place_in(name, error)}{told}",
            code="model-fails",
        ) from error
    model.train()


def _split(name: str) -> tuple[Path, str]:
    path, _, class_name = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    return Path(path).expanduser(), class_name


def _no_such_class(name: str, classes: list[str]) -> UserError:
    path, class_name = _split(name)
    hint = did_you_mean(class_name, classes)
    given = f"there is no class {class_name} in the file{hint}" if class_name else "name a class"
    listed = f"it has {', '.join(classes)}" if classes else "it has no class at all"
    return UserError(
        f"--model {name}: {given}; {listed}; type {path}:ClassName", code="unknown-class"
    )
