"""What a user can get wrong, told as one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake the user can mend: says what was given, what would work, what to type.

    The program prints it once, whatever the number of processes, and exits with status 2.
    """
