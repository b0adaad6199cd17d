"""What a user is meant to read: the one error, and the one warning."""


class HyLoError(ValueError):
    """Bad input, told in one line: what is wrong and what was expected.

    The command line prints the message and exits with 1. Anything else that escapes is a bug and keeps its traceback.
    """


class HyLoWarning(UserWarning):
    """Something that works, but not as it should: says what to do about it."""
