"""Training: data, the coarse and the fine stage, many processes, checkpoints."""

from lhc_triton.training.config import TrainConfig, read_config
from lhc_triton.training.data import (
    Data,
    ImageFormat,
    ImageSet,
    Source,
    open_data,
    validation_split,
)
from lhc_triton.training.loop import TrainResult, train
from lhc_triton.training.metrics import EpochMetrics
from lhc_triton.training.presets import PRESETS

__all__ = [
    "PRESETS",
    "Data",
    "EpochMetrics",
    "ImageFormat",
    "ImageSet",
    "Source",
    "TrainConfig",
    "TrainResult",
    "open_data",
    "read_config",
    "train",
    "validation_split",
]
