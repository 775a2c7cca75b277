"""Errors that are no fault of the program."""


class UserError(Exception):
    """A mistake in what the user gave: its message says what was received and what to do.

    `train.py` prints it as one line on stderr and exits with status 2.
    """


class Diverged(Exception):
    """The loss has become NaN or infinite: its message says where, and what to try.

    `train.py` prints it as one line, leaves results.json with nulls, and exits with status 1.
    """
