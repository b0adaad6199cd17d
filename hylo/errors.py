"""The one error that a user is meant to read."""


class HyLoError(ValueError):
    """Bad input, told in one line: what is wrong and what was expected.

    The command line prints the message and exits with 1. Anything else that escapes is a bug and keeps its traceback.
    """
