"""argparse whose mistakes are a sentence each, for every command line of the program."""

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from common.errors import USER_ERROR, UserError
from common.streams import heard

PACKAGES = ("torch", "torchvision", "accelerate", "safetensors", "numpy", "PIL", "rich", "yaml")


def need_packages() -> None:
    """UserError where this Python lacks what the program is built on, with what to type."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        home = Path(__file__).resolve().parent.parent
        raise UserError(
            f"the Python at {sys.executable} lacks {', '.join(missing)}: activate the environment "
            f"that has them, or type {sys.executable} -m pip install -e {home}",
            code="not-installed",
        )


def need_packages_or_exit() -> None:
    """The same for a command whose modules import the packages at their top: call it before."""
    try:
        need_packages()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(USER_ERROR)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence, without its page of usage."""

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"argument (?:.*/)?(--[\w-]+): expected one argument", message)
        if flag:
            message += f" (one that begins with - is typed {flag[1]}=VALUE)"
        raise UserError(
            f"{message}; see python {self.prog.removeprefix('python ')} --help", code="unknown-flag"
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After --help or --version, which a full disk may have cut."""
        super().exit(int(heard(status) or 0), message)
