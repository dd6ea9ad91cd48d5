"""How many rows run at once, and what becomes of that when memory runs out."""

from __future__ import annotations

from ..errors import RunError
from .plans import chunk_slices


class BatchLimit:
    """The largest batches of a run.

    Args:
        max_rows: of one transformer call; 0 is unlimited.
        decode_rows: of decoder and rewards, where it is less than ``max_rows``; 0 is ``max_rows``.
    """

    def __init__(self, max_rows: int = 0, decode_rows: int = 0) -> None:
        self.max_rows, self.decode_rows = max_rows, decode_rows
        self._largest, self._halved = 0, False

    @property
    def state(self) -> tuple[int, bool]:
        """``max_rows``, and whether it was halved for lack of memory: part of what a resumed run must repeat."""
        return self.max_rows, self._halved

    @state.setter
    def state(self, state: tuple[int, bool]) -> None:
        self.max_rows, self._halved = state

    def chunks(self, rows: int) -> list[slice]:
        """Slices of at most ``max_rows`` rows, about to run."""
        self.note(min(self.max_rows or rows, rows))
        return chunk_slices(rows, self.max_rows)

    def decode_chunks(self, rows: int) -> list[slice]:
        """Slices of at most ``max_rows`` and ``decode_rows`` rows."""
        return chunk_slices(rows, self.max_rows, self.decode_rows)

    def note(self, rows: int) -> None:
        """A batch of so many rows is about to run."""
        self._largest = max(self._largest, rows)

    @property
    def largest(self) -> int:
        """Rows of the largest batch so far."""
        return self._largest

    def halve(self, error: Exception | None, largest: int, graphs: bool = False) -> None:
        """After an out-of-memory error: half the largest batch that ran, once.

        Args:
            error: of this rank; None of another one.
            largest: batch of any rank.
            graphs: CUDA graphs hold memory too, which the message then says.

        Raises:
            RunError: it was halved before, or is one row already.
        """
        if self._halved or largest < 2:
            off = ", turn engine.cuda_graphs off," if graphs else ""
            raise RunError(
                f"out of memory while sampling, also in batches of {largest}: lower engine.max_rows or "
                f"model.prompt_cache{off} and go on with --resume auto; in a new run lower the resolution or take "
                "model.tuning = lora"
            ) from error
        self._halved, self.max_rows, self._largest = True, largest // 2, 0
