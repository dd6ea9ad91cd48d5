"""Two records side by side: only differences beyond the noise of their rounds."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .records import Record, read_record
from .statistics import Change, change


def compare(before: Record, after: Record) -> list[Change]:
    """Changes beyond noise (``statistics.change``) of the quantities both records hold.

    Raises:
        InputError: records of different cases, devices or processors, or without a common quantity.
    """
    for key, a, b in (
        ("case", before.case, after.case),
        ("device", before.device, after.device),
        ("processor", before.machine.get("processor"), after.machine.get("processor")),
    ):
        if a != b:
            raise InputError(f"records of different {key}s cannot be compared: {a} and {b}")
    names = [name for name in before.series if name in after.series]
    if not names:
        raise InputError(f"the two records of {before.case} have no quantity in common; measure one of them again")
    changes = (change(name, before.series[name], after.series[name]) for name in names)
    return [c for c in changes if c is not None]


def compare_command(before: Path, after: Path, fail: bool) -> int:
    """Print the changes; with ``fail`` the exit code is 1 when anything got worse."""
    a, b = read_record(before), read_record(after)
    changes = compare(a, b)
    for c in changes:
        print(c)
    only = sorted(a.series.keys() ^ b.series.keys())
    if only:
        print(f"in one of them only: {', '.join(only)}")
    rounds = min(len(s.values) for r in (a, b) for s in r.series.values())
    same = sum(name in b.series for name in a.series) - len(changes)
    print(f"{same} of {same + len(changes)} quantities within noise ({rounds} rounds: 3 x pooled spread and 1 %)")
    for record in (a, b):
        if record.note:
            print(f"note of {record.date}: {record.note}")
    return int(fail and any(c.verdict == "worse" for c in changes))
