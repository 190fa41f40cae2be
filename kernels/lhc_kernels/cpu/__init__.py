"""The native CPU kernel: C++ sources beside this file, built on first use. Needs torch and a C++ compiler."""

from .building import BuildError, build
from .loading import load, loaded, problem

__all__ = ["BuildError", "build", "load", "loaded", "problem"]
