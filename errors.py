"""What a user can get wrong, told as one sentence instead of a traceback; how a process ends."""


class UserError(ValueError):
    """A mistake the user can mend: says what was given, what would work, what to type.

    The program prints it once, whatever the number of processes, and exits with status 2.
    """


# Exit status of a process of ours; 130 is a second Ctrl-C at a terminal.
FINISHED, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75


class NumbersGoneBad(RuntimeError):
    """A loss or gradient that is not finite; every process raises it at the same step."""
