"""Training: data, the coarse and the fine stage, checkpoints."""

from lhc_triton.training.data import (
    Data,
    FashionMNIST,
    ImageFormat,
    ImageSet,
    Source,
    open_data,
    validation_split,
)
from lhc_triton.training.loop import TrainResult, train
from lhc_triton.training.metrics import EpochMetrics
from lhc_triton.training.presets import PRESETS, TrainConfig

__all__ = [
    "PRESETS",
    "Data",
    "EpochMetrics",
    "FashionMNIST",
    "ImageFormat",
    "ImageSet",
    "Source",
    "TrainConfig",
    "TrainResult",
    "open_data",
    "train",
    "validation_split",
]
