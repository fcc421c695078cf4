"""The source of a class that lives in memory, as a file that stands alone."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType


def standalone_source(made: type) -> str:
    """A file that defines the class and what it uses of the module or notebook it was written in.

    What comes from elsewhere is imported. Whether the file really stands alone, trying it tells: a
    name whose value is neither code nor plain is left out. Raises OSError or TypeError where Python
    knows no source.
    """
    functions = list(_functions(made))
    scope = functions[0].__globals__ if functions else vars(sys.modules[made.__module__])
    imports: list[str] = []
    pieces: list[str] = []
    seen = {made.__name__}

    def define(text: str) -> None:
        """What a piece of source needs goes before it."""
        for name in _names(text):
            if name in scope and name not in seen and not hasattr(builtins, name):
                seen.add(name)
                need(name, scope[name])
        pieces.append(text)

    def need(name: str, value: object) -> None:
        if isinstance(value, ModuleType):
            as_name = "" if value.__name__ == name else f" as {name}"
            imports.append(f"import {value.__name__}{as_name}")
            return
        home, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if isinstance(value, type | FunctionType) and home == made.__module__:
            define(_text(value))
            if own != name:
                pieces.append(f"{name} = {own}")
        elif home and own and getattr(sys.modules.get(home), own, None) is value:
            imports.append(f"from {home} import {own}" + ("" if own == name else f" as {name}"))
        elif _is_plain(value):
            pieces.append(f"{name} = {value!r}")

    define(_text(made))
    head = f'"""{made.__name__}, as fit() was given it."""'
    return "\n\n\n".join(filter(None, [head, "\n".join(sorted(imports)), *pieces])) + "\n"


def _functions(made: type) -> Iterator[FunctionType]:
    """The functions written in the body of a class."""
    for value in vars(made).values():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(value, FunctionType):
            yield inspect.unwrap(value)


def _text(value: type | FunctionType) -> str:
    """The source of a function or a class, decorators included.

    Of a class in a notebook only its functions know where it was written (Python before 3.13).
    """
    if isinstance(value, type):
        for function in _functions(value):
            lines = linecache.getlines(function.__code__.co_filename)
            first = function.__code__.co_firstlineno
            for node in ast.walk(ast.parse("".join(lines))):
                if not isinstance(node, ast.ClassDef) or node.name != value.__name__:
                    continue
                if node.lineno <= first <= (node.end_lineno or 0):
                    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                    return textwrap.dedent("".join(lines[start - 1 : node.end_lineno])).rstrip()
    return textwrap.dedent(inspect.getsource(value)).rstrip()


def _names(text: str) -> list[str]:
    """The names that source reads, in order."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    return list(dict.fromkeys(node.id for node in nodes))


def _is_plain(value: object) -> bool:
    """Whether a value is written as it is shown: numbers, text, and what holds them."""
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, TypeError):
        return False
