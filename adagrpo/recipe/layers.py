"""A recipe over its bases: which value holds, where it comes from, and what of the inherited does not apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..models.registry import FAMILIES
from ..parts.plugins import is_import_path
from ..text.redaction import redacted_kwargs
from ..text.user_text import shown
from .dotted import leaves, lookup, replaced
from .keys import Config, listed
from .rules import check, problems

_TAKERS = {
    "model.kwargs": ("model.family",),
    "selection.kwargs": ("selection.strategy",),
    "advantage.kwargs": ("advantage.function",),
    "data.kwargs": ("data.prompts", "data.held_out"),
}
"""The keys that name who takes the arguments."""


@dataclass(frozen=True)
class Layer:
    """What one file, or the command line, says.

    Attributes:
        label: ``base NAME``, ``this recipe`` or ``command line``.
        source: how messages name it.
        values: dotted key → value, of the keys it names; beside ``rewards`` also the keys of its entries.
        own: whether the user said it for this run: then a key that does not apply is an error. Of a base, and of a recipe that
            ships with the package, it is dropped.
    """

    label: str
    source: str
    values: Mapping[str, Any]
    own: bool


class Dropped(NamedTuple):
    """An inherited key that does not apply and is back at its default: its value before (for a message), and why."""

    key: str
    value: str
    source: str
    why: str


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        layers: what it was resolved from, each over those before it.
        origins: dotted key → the layer its value comes from; a key that is missing has its default.
        dropped: what was inherited and does not apply.
    """

    config: Config
    layers: tuple[Layer, ...]
    origins: Mapping[str, Layer]
    dropped: tuple[Dropped, ...]

    def overridden(self, config: Config, words: Sequence[str]) -> Recipe:
        """The recipe under a command line.

        Args:
            config: what the command line made of this recipe.
            words: of that command line; a key named there is the user's, if it has the same value as before.
        """
        before, after = leaves(self.config), leaves(config)
        named = {key for word in words if (key := _option(word, after))}
        changed = {key for key, value in after.items() if key not in before or before[key] != value}
        values = {key: value for key, value in after.items() if key in named | changed}
        return resolve([*self.layers, Layer("command line", "command line", values, own=True)])

    def check(self) -> None:
        """Refuse what cannot be or cannot work together.

        Raises:
            InputError: naming the key, the value, what is allowed and, of an inherited value, the base.
        """
        check(self.config, self._base)

    def _base(self, key: str) -> str:
        """The base that a key's value comes from, for a message; empty for others."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        label = self.origins[key].label if key else ""
        return f" ({label})" if label.startswith("base ") else ""

    def origin(self, key: str) -> str:
        """Where the value of a key comes from: ``default``, ``base NAME``, ``this recipe`` or ``command line``."""
        if key in self.origins:
            return self.origins[key].label
        return "default" + "".join(f"; dropped: {value} of {source}" for name, value, source, _ in self.dropped if name == key)

    @property
    def notice(self) -> str:
        """What was inherited and does not apply, for the user; empty if all does."""
        by_reason: dict[str, list[str]] = {}
        for key, value, source, why in self.dropped:
            by_reason.setdefault(f"of {source} ({why})", []).append(f"{key} = {value}")
        parts = [f"{', '.join(keys)} {reason}" for reason, keys in by_reason.items()]
        return f"inherited keys that do not apply are back at their defaults: {'; '.join(parts)}" if parts else ""


def resolve(layers: Sequence[Layer]) -> Recipe:
    """The recipe of several layers, each over those before it, without inherited keys that do not apply.

    Single keys take each other's place; lists, ``kwargs`` and ``[[rewards]]`` do so as a whole. An inherited key is dropped, so
    that its default holds, if nothing reads it beside the other values; ``kwargs`` also if a later layer names another part to
    take them, and a guidance if the model is of another family. Values that contradict each other stay, for ``check`` to
    refuse.
    """
    origins: dict[str, Layer] = {}
    dropped: list[Dropped] = []
    for layer in layers:
        for key in _kwargs_of_others(layer, origins):
            below = origins.pop(key)
            dropped.append(Dropped(key, shown(redacted_kwargs(below.values[key])), below.source, "was for another part"))
        if "rewards" in layer.values:
            origins = {key: below for key, below in origins.items() if not key.startswith("rewards.")}
        origins |= dict.fromkeys(layer.values, layer)
    guiding = origins.get("model.guidance")
    if guiding and not guiding.own and _family(layers) != _family(layers, guiding):
        value = shown(guiding.values["model.guidance"])
        dropped.append(Dropped("model.guidance", value, guiding.source, "was for another family"))
        del origins["model.guidance"]
    while True:
        config = Config()
        for key, layer in origins.items():
            config = replaced(config, key, layer.values[key])
        if "model.guidance" not in origins and (family := FAMILIES.get(config.model.family)):
            config = replaced(config, "model.guidance", family.guidance)
        problem = next(problems(config), None)
        unread = origins.get(problem.unread) if problem else None
        if problem is None or unread is None or unread.own:
            return Recipe(config, tuple(layers), origins, tuple(each for each in dropped if each.key not in origins))
        value = problem.value if problem.key == problem.unread else lookup(config, problem.unread)
        dropped.append(Dropped(problem.unread, shown(value), unread.source, problem.remedy))
        del origins[problem.unread]


def _family(layers: Sequence[Layer], last: Layer | None = None) -> str:
    """``model.family`` of the layers, or of those up to ``last``."""
    found = Config().model.family
    for layer in layers:
        found = layer.values.get("model.family", found)
        if layer is last:
            break
    return found


def _kwargs_of_others(layer: Layer, origins: Mapping[str, Layer]) -> list[str]:
    """The inherited ``kwargs`` whose takers a layer replaces by others without giving them any."""
    found = []
    for key, takers in _TAKERS.items():
        below = origins.get(key)
        if below is None or below.own or key in layer.values or not below.values[key]:
            continue
        now = {taker: origins[taker].values[taker] for taker in takers if taker in origins}
        kept = {t: name for t, name in now.items() if layer.values.get(t, name) == name}
        if now != kept and not any(is_import_path(name) for names in kept.values() for name in listed(names)):
            found.append(key)
    return found


def _option(word: str, keys: Mapping[str, Any]) -> str | None:
    """The key that a word of a command line names, as ``--section.key`` or ``--section.no-key``."""
    if not word.startswith("--"):
        return None
    name = word[2:].partition("=")[0].replace("-", "_")
    section, dot, last = name.rpartition(".")
    for key in (name, f"{section}{dot}{last.removeprefix('no_')}"):
        if key in keys:
            return key
    return next((key for key in keys if name.startswith(f"{key}.")), None)
