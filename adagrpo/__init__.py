"""AdaGRPO: online reinforcement learning for text-to-image flow models, with a capability curriculum and fused advantages."""

from .algorithm.advantages import fused_advantage
from .algorithm.sde import step_table
from .algorithm.selection import CapabilityCurriculum
from .version import VERSION as __version__

__all__ = ["CapabilityCurriculum", "__version__", "fused_advantage", "step_table"]
