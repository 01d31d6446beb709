"""The exception of training and export that is meant for the user."""


class FocalPathError(ValueError):
    """A user's mistake: the message says what was found, what was expected, and what to do."""
