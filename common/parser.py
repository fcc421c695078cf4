"""argparse whose mistakes are a sentence each, for every command line of the program."""

import argparse
from typing import NoReturn

from errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence, without its page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}; see python {self.prog.removeprefix('python ')} --help", code="unknown-flag"
        )
