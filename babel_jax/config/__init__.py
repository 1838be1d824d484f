"""Every setting of the project: typed, validated and frozen. `config.file.load_config` reads settings from
TOML.

The resolved config (`Config.to_toml`) in a run folder is enough to repeat the run: its local paths are
absolute.
"""

from babel_jax.config.cleaning import (
    CleaningSettings,
    DecontaminationSettings,
    DeduplicationSettings,
    Engine,
    Rule,
)
from babel_jax.config.data import BadRows, DataSettings, MixtureSettings, Source, Strategy
from babel_jax.config.expansion import Deepening, ExpansionSettings, Init, Moments
from babel_jax.config.languages import LanguageSettings
from babel_jax.config.model import (
    Activation,
    Family,
    LayerType,
    ModelConfig,
    ModelSource,
    RopeScaling,
    RopeType,
)
from babel_jax.config.run import Config, EvaluationSettings
from babel_jax.config.settings import Settings
from babel_jax.config.training import (
    BESIDE_THE_STEP,
    CHANGEABLE,
    AttentionKernel,
    ComputeType,
    MatmulType,
    OptimizerRule,
    OptimizerSettings,
    Remat,
    Schedule,
    ScheduleKind,
    Stage,
    Trained,
    TrainingSettings,
)
from babel_jax.config.vocabulary import Marks, RowInit, Shares, VocabularySettings

__all__ = [
    "BESIDE_THE_STEP",
    "CHANGEABLE",
    "Activation",
    "AttentionKernel",
    "BadRows",
    "CleaningSettings",
    "ComputeType",
    "Config",
    "DataSettings",
    "DecontaminationSettings",
    "DeduplicationSettings",
    "Deepening",
    "Engine",
    "EvaluationSettings",
    "ExpansionSettings",
    "Family",
    "Init",
    "LanguageSettings",
    "LayerType",
    "Marks",
    "MatmulType",
    "MixtureSettings",
    "ModelConfig",
    "ModelSource",
    "Moments",
    "OptimizerRule",
    "OptimizerSettings",
    "Remat",
    "RopeScaling",
    "RopeType",
    "RowInit",
    "Rule",
    "Schedule",
    "ScheduleKind",
    "Settings",
    "Shares",
    "Source",
    "Stage",
    "Strategy",
    "Trained",
    "TrainingSettings",
    "VocabularySettings",
]
