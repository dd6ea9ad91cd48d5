"""The exceptions users are meant to read; the command line shows them without a traceback."""


class InputError(ValueError):
    """Bad input: a single message that names the file or key and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: what happened, what is safe, and the remedy. Exit code 1."""
