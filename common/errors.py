"""What a user can get wrong, told as one sentence instead of a traceback; how a process ends."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake the user can mend: says what was given, what would work, what to type.

    The program prints it once, whatever the number of processes, and exits with status 2. `code`
    names the kind of mistake for tests and programs; it stays when the sentence is reworded.
    """

    def __init__(self, message: str, *, code: str = "user-error"):
        super().__init__(message)
        self.code = code
        self.printed = False  # by this process, already


def all_of(problems: Sequence[UserError]) -> UserError:
    """Several mistakes told together, a line each; the code is that of the first."""
    return UserError("\n".join(map(str, problems)), code=problems[0].code)


# Exit status of a process of ours; 130 is a second Ctrl-C at a terminal.
FINISHED, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75


class Left(Exception):
    """What a process waits for does not come, and it is to stop: it leaves between two steps."""


class NumbersGoneBad(RuntimeError):
    """A loss or gradient that is not finite; every process raises it at the same step."""
