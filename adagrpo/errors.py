"""The one exception users are meant to read."""


class InputError(ValueError):
    """Bad input: a single message that names the file or key and the remedy. Shown without a traceback."""
