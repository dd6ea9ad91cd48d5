"""The exceptions users are meant to read; the command line shows them without a traceback."""

import signal


class InputError(ValueError):
    """Bad input: a single message that names the file or key and the remedy. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: what happened, what is safe, and the remedy. Exit code 1."""


class Stopped(KeyboardInterrupt):
    """A signal ended a command that had nothing to save. Exit code 128 + its number.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number
