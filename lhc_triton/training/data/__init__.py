"""Data sets as sources of batches: opening, splitting, augmenting, normalising."""

from lhc_triton.training.data.fashion import open_fashion
from lhc_triton.training.data.memory import ImageSet
from lhc_triton.training.data.opening import DataName, OnBadFile, expected_format, most_images, open_data
from lhc_triton.training.data.source import Augmentation, BadFile, Batch, Data, ImageFormat, Source
from lhc_triton.training.data.splits import balanced_indices, validation_split

__all__ = [
    "Augmentation",
    "BadFile",
    "Batch",
    "Data",
    "DataName",
    "ImageFormat",
    "ImageSet",
    "OnBadFile",
    "Source",
    "balanced_indices",
    "expected_format",
    "most_images",
    "open_data",
    "open_fashion",
    "validation_split",
]
