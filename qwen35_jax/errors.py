"""The exception that stands for wrong input rather than a bug, and its form on the hosts that have none."""


class UserError(ValueError):
    """Wrong input: the message is one line that says what was wrong, where, and what to do about it.

    Command lines print it as `error: …` and exit with status 1; a traceback is left for our own mistakes.
    """


class OtherHostError(UserError):
    """Another host has wrong input, and says what it is."""
