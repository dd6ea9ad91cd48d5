"""The keys of a recipe and their defaults, as frozen dataclasses: ``recipe.load`` reads and ``recipe.rules`` checks them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .data import DataConfig, EvaluationConfig, RewardConfig, listed
from .keeping import BudgetConfig, GuardConfig, GuardsConfig, OutputConfig
from .kwargs import KwargValue
from .learning import JUDGES, POOLED, RIVALS, AdvantageConfig, LossConfig, Probe, SelectionConfig
from .policy import BUILT_IN_MODEL, BUILT_IN_MODELS, RANDOM_MODELS, ModelConfig, RolloutConfig
from .training import EngineConfig, OptimizerConfig, TrainConfig

__all__ = [
    "BUILT_IN_MODEL",
    "BUILT_IN_MODELS",
    "JUDGES",
    "POOLED",
    "RANDOM_MODELS",
    "RIVALS",
    "AdvantageConfig",
    "BudgetConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "GuardsConfig",
    "KwargValue",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Probe",
    "RewardConfig",
    "RolloutConfig",
    "SelectionConfig",
    "TrainConfig",
    "bucket_size",
    "listed",
]


@dataclass(frozen=True)
class Config:
    """A recipe."""

    name: str = "unnamed"
    """The name of a folder; without --out a run goes into runs/<name>-001, or the first number not taken."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)


def bucket_size(bucket: str) -> tuple[int, int]:
    """Height and width of ``HEIGHTxWIDTH``.

    Raises:
        ValueError: another form.
    """
    height, width = bucket.split("x")
    return int(height), int(width)
