"""The head that LAION's aesthetic predictor and ImageReward share: linear layers one after the other, without activations."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import InputError

Sides = Mapping[int, tuple[int, int]]
_LAYERS = (0, 2, 4, 6, 7)  # as both files number them; dropouts are in between


class LinearHead(nn.Module):
    """Features [N, D] -> [N, 1]; its tensors are named as they are published, ``layers.0.weight`` and so on.

    Args:
        sides: features that each layer takes and makes, by its number.
    """

    def __init__(self, sides: Sides) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Linear(*pair) for number, pair in sides.items()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features


def read_sides(state: Mapping[str, Tensor], prefix: str, where: str) -> Sides:
    """What the layers of a file's head take and make; its names begin with ``prefix``.

    Raises:
        InputError: a layer is missing, or does not take what the one before makes.
    """
    sides: dict[int, tuple[int, int]] = {}
    for number in _LAYERS:
        name = f"{prefix}layers.{number}.weight"
        tensor = state.get(name)
        if tensor is None or tensor.ndim != 2:
            raise InputError(f"{where}: holds no {name} of a head of linear layers; name the published file")
        before = [made for _, made in sides.values()][-1:] or [tensor.shape[1]]
        if before != [tensor.shape[1]] or (number == _LAYERS[-1] and tensor.shape[0] != 1):
            raise InputError(f"{where}: {name} has shape {list(tensor.shape)}, which does not fit the layers around it")
        sides[number] = (tensor.shape[1], tensor.shape[0])
    return sides
