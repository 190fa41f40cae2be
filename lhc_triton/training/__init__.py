"""Training: data, the coarse and the fine stage, checkpoints."""

from lhc_triton.training.config import TrainConfig, read_config
from lhc_triton.training.data import FashionMNIST, ImageSet, augment, load_idx, normalise, validation_split
from lhc_triton.training.loop import TrainResult, train
from lhc_triton.training.metrics import EpochMetrics
from lhc_triton.training.presets import PRESETS

__all__ = [
    "PRESETS",
    "EpochMetrics",
    "FashionMNIST",
    "ImageSet",
    "TrainConfig",
    "TrainResult",
    "augment",
    "load_idx",
    "normalise",
    "read_config",
    "train",
    "validation_split",
]
