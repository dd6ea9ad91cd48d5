"""Guards that act on the metrics of an iteration, before its weights can become a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..recipe.keys import GuardConfig, GuardsConfig

METRICS = {
    "kl": "policy/kl",
    "grad_norm": "policy/grad_norm",
    "ratio": "policy/ratio_deviation",
    "failed_rewards": "advantage/failed",
    "equal_groups": "advantage/equal_groups",
}
MEANING = {
    "reward_hacking": "the held-out reward fell below its best while the trained reward rose",
    "kl": "the policy moved far from the initial one",
    "grad_norm": "the gradient norm is large",
    "ratio": "the on-policy ratio left 1: sampling and update disagree",
    "failed_rewards": "rewards fail",
    "equal_groups": "the samples of a group no longer differ in reward",
    "non_finite": "loss or gradient is not finite",
}


@dataclasses.dataclass(frozen=True)
class Trip:
    """A guard that tripped: its name, what to do (``warn``, ``stop``, ``rollback``), and a message for the user."""

    name: str
    action: str
    message: str


class Guards:
    """Watches the records of a run; its state belongs in the checkpoint.

    Args:
        config: limits, actions, patience.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.rows = dict.fromkeys(MEANING, 0)
        self.best: tuple[float, float] | None = None
        self.trained: list[float] = []

    def observe(self, record: Mapping[str, Any]) -> list[Trip]:
        """The guards this iteration's record trips; a guard warns once per ``patience`` excesses in a row."""
        trips = []
        for name, value in self._values(record).items():
            guard: GuardConfig = getattr(self.config, name)
            if not guard.limit:
                continue
            exceeded = not value <= guard.limit
            self.rows[name] = self.rows[name] + 1 if exceeded else 0
            if self.rows[name] >= guard.patience:
                self.rows[name] = 0
                times = f" {guard.patience} times in a row" if guard.patience > 1 else ""
                detail = f"guards.{name}: {MEANING[name]} ({value:.4g}, limit {guard.limit:g}{times})"
                trips.append(Trip(name, guard.action, detail))
        return trips

    def state_dict(self) -> dict[str, Any]:
        """Counters, what they count, and best value so far."""
        counted = {"rows": dict(self.rows), "limits": {name: self._limit(name) for name in self.rows}}
        return {**counted, "best": self.best, "trained": list(self.trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; a guard with another limit starts to count anew."""
        limits = state.get("limits", {})
        self.rows = {n: rows if limits.get(n, self._limit(n)) == self._limit(n) else 0 for n, rows in state["rows"].items()}
        self.best, self.trained = state["best"], list(state["trained"])

    def forget_best(self) -> None:
        """The held-out reward is measured otherwise from now on."""
        self.best, self.rows["reward_hacking"] = None, 0

    def _limit(self, name: str) -> float:
        return getattr(self.config, name).limit

    def _values(self, record: Mapping[str, Any]) -> dict[str, float]:
        values = {name: float(record[key]) for name, key in METRICS.items() if key in record}
        finite = math.isfinite(record["policy/loss"]) and math.isfinite(record["policy/grad_norm"])
        values["non_finite"] = 0.0 if finite else 1.0
        if math.isfinite(record["reward/train"]):
            self.trained.append(record["reward/train"])
        if self.trained and math.isfinite(record.get("reward/held_out", math.nan)):
            values["reward_hacking"] = self._fall(record["reward/held_out"])
        return values

    def _fall(self, held_out: float) -> float:
        """How far the held-out reward lies below its best, if the trained reward has risen since; else 0."""
        trained, self.trained = sum(self.trained) / len(self.trained), []
        if self.best is None or held_out > self.best[0]:
            self.best = (held_out, trained)
            return 0.0
        return self.best[0] - held_out if trained > self.best[1] else 0.0
