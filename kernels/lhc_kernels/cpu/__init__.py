"""The native CPU kernel: C++ sources beside this file, built on first use. Needs torch and a C++ compiler."""

from .build import BuildError, build
from .load import load, problem

__all__ = ["BuildError", "build", "load", "problem"]
