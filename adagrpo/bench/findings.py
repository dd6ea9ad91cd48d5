"""What one part of `adagrpo bench gpu` finds: rows and checks, recorded as they come; a failure is written down, not raised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..recipe.keys import Config
from ..text.strict_json import to_json
from .records import new_record
from .statistics import Series
from .timers import Deadline

Row = dict[str, Any]
SERIES = {"us": "us", "ms": "ms", "seconds": "s"}  # columns of a row that are series of a record, with their units


@dataclasses.dataclass
class Findings:
    """Tables of one part, rewritten to its one record after every row.

    Attributes:
        part: names the record, ``gpu-<part>``.
        facts: what belongs to all rows.
        deadline: once it has passed nothing more is measured, and that is recorded.
        rows: by table. A row with ``flag`` is of something that failed a check, one with ``failed`` was not measured at all.
        checks: '' for those that passed, else what is wrong.
        not_measured: what there was no time for, or what failed before it had a row.
        config: the recipe that was measured, if one was.
    """

    part: str
    device: torch.device
    out: Path
    deadline: Deadline
    argv: tuple[str, ...] = ()
    note: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    checks: dict[str, str] = dataclasses.field(default_factory=dict)
    not_measured: list[str] = dataclasses.field(default_factory=list)
    config: Config | None = None

    def check(self, name: str, problem: Callable[[], str]) -> str:
        """Run a check; ``problem`` says what is wrong, '' if nothing. What it raises is what is wrong."""
        if self.deadline.passed:
            found = "not checked: no time left"
        else:
            try:
                found = problem()
            except Exception as error:
                found = _told(error)
        self.checks[name] = found
        print(f"check {name}: {found or 'pass'}", flush=True)
        self.write()
        return found

    def flags(self, names: Iterable[str]) -> str:
        """What is wrong with the checks ``names``, in a line; '' if they passed."""
        return "; ".join(f"{name}: {self.checks[name]}" for name in names if self.checks.get(name))

    def row(self, table: str, name: dict[str, str], measure: Callable[[], Row], flag: str = "") -> Row:
        """Measure a row of ``table``, called ``name``; ``flag`` says why its figures are not to be trusted."""
        title = ", ".join([table, *name.values()])
        if self.deadline.passed:
            self.not_measured.append(title)
            self.write()
            return dict(name)
        row: Row = dict(name)
        try:
            row |= measure()
        except Exception as error:
            row["failed"] = _told(error)
        values = [v for key in SERIES if key in row for v in row[key]]
        if not all(map(math.isfinite, values)):
            flag = "; ".join(filter(None, (flag, "not finite")))
        if flag:
            row["flag"] = flag
        self.rows.setdefault(table, []).append(row)
        print(to_json({"table": table, **row}), flush=True)
        self.write()
        return row

    def section(self, name: str, measure: Callable[[], object]) -> None:
        """Run what makes several rows; what it raises ends it alone."""
        try:
            measure()
        except Exception as error:
            self.not_measured.append(f"{name}: {_told(error)}")
            print(f"{self.not_measured[-1]}", flush=True)
            self.write()

    @property
    def sound(self) -> bool:
        """Whether every check passed and every row was measured."""
        rows = [row for table in self.rows.values() for row in table]
        return not (any(self.checks.values()) or self.not_measured or any("flag" in r or "failed" in r for r in rows))

    def series(self) -> dict[str, Series]:
        """The figures of all rows without a flag, by table and name: what records are compared by."""
        found = {}
        for table, rows in self.rows.items():
            for row in rows:
                if "flag" in row or "failed" in row:
                    continue
                title = ", ".join([table, *(str(row[key]) for key in ("case", "shape", "dtype") if key in row)])
                for key, unit in SERIES.items():
                    if key in row:
                        found[title] = Series(unit, tuple(row[key]))
        return found

    def write(self) -> Path:
        """The record so far."""
        facts = {**self.facts, "checks": self.checks, "rows": self.rows, "not_measured": self.not_measured}
        record = new_record(f"gpu-{self.part}", self.device, self.argv, self.series(), facts, self.config, self.note)
        return record.write(self.out)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
