"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: its message says what was received and what to do.

    `train.py` prints it as one line on stderr and exits with status 2.
    """
