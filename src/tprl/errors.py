"""The one exception a user is meant to read: a single sentence that names the value and the
remedy."""


class UserError(ValueError):
    """Bad input. Entry points print its message as one line and exit with status 2, without a
    traceback."""
