"""Errors that are the user's to fix."""


class UserError(ValueError):
    """A user's mistake, told in one line: what it must be, what it was, what to do."""
