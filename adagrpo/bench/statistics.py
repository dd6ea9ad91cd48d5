"""Repeated measurements: median, spread, and when two of them differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any, Literal

Better = Literal["lower", "higher", ""]
NORMAL = 1.4826  # of a normal sample, the median absolute deviation times this is its standard deviation
SPREADS, LEAST = 3.0, 0.01


@dataclasses.dataclass(frozen=True)
class Series:
    """One quantity, measured once per round.

    Attributes:
        unit: of ``values``, such as ``s`` or ``evaluations``.
        values: in the order measured.
        better: which direction is an improvement; '' where neither is.
        exact: a counter: it has no noise, and any difference is real.
    """

    unit: str
    values: tuple[float, ...]
    better: Better = "lower"
    exact: bool = False

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def spread(self) -> float:
        """Median absolute deviation from the median, times 1.4826; 0 for counters."""
        return 0.0 if self.exact else NORMAL * median(abs(v - self.median) for v in self.values)

    def to_json(self) -> dict[str, Any]:
        """What a record keeps."""
        return {**dataclasses.asdict(self), "values": list(self.values), "median": self.median, "spread": self.spread}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Series:
        """Inverse of ``to_json``; median and spread are computed anew.

        Raises:
            ValueError, KeyError, TypeError: not such a table.
        """
        values = tuple(float(v) for v in data["values"])
        if not values or not all(map(math.isfinite, values)):
            raise ValueError("a series needs finite values")
        return cls(str(data["unit"]), values, data["better"], bool(data["exact"]))


@dataclasses.dataclass(frozen=True)
class Change:
    """How a quantity moved between two records.

    Attributes:
        share: ``after / before - 1``.
        verdict: better, worse, or changed where neither direction is an improvement.
    """

    name: str
    unit: str
    before: float
    after: float
    share: float
    verdict: Literal["better", "worse", "changed"]

    def __str__(self) -> str:
        return f"{self.name}: {self.before:.4g} → {self.after:.4g} {self.unit} ({self.share:+.1%}, {self.verdict})"


def change(name: str, before: Series, after: Series) -> Change | None:
    """The change, or None where it is within the noise.

    A difference counts when it exceeds both three times the pooled spread of the rounds, ``sqrt((s² + s'²) / 2)``, and 1 % of
    the median before; of counters, when there is any.
    """
    a, b = before.median, after.median
    difference = b - a
    if before.exact and after.exact:
        if difference == 0:
            return None
    else:
        pooled = math.sqrt((before.spread**2 + after.spread**2) / 2)
        if abs(difference) <= max(SPREADS * pooled, LEAST * abs(a)):
            return None
    share = difference / abs(a) if a else math.copysign(math.inf, difference)
    if not before.better:
        return Change(name, before.unit, a, b, share, "changed")
    worse = (difference > 0) == (before.better == "lower")
    return Change(name, before.unit, a, b, share, "worse" if worse else "better")


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Series:
    """Round by round ratio of two interleaved quantities."""
    return Series("x", tuple(a / b for a, b in zip(numerator, denominator, strict=True)), better="")


def paired_interval(reference: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ``other - reference`` over pairs and its 95 % Student t interval; NaN limits for a single pair."""
    from scipy.stats import t

    differences = [b - a for a, b in zip(reference, other, strict=True)]
    mean, n = fmean(differences), len(differences)
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def detectable_difference(reference: Sequence[float], other: Sequence[float]) -> float:
    """The least true mean difference that four of five such studies would find, two-sided at 5 %, by the spread of the pairs'
    differences; NaN for a single pair."""
    from scipy.stats import t

    differences = [b - a for a, b in zip(reference, other, strict=True)]
    n = len(differences)
    return float(t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) * stdev(differences) / math.sqrt(n) if n > 1 else math.nan
