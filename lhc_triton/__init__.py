"""Convolutions that learn their own topology, and kernels that only touch what is left."""

__version__ = "0.1.0"
