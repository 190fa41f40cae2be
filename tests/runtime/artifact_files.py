"""Accelerated networks in files, for the tests: saved quickly, taken apart, and put together again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from runtime_networks import image
from safetensors import safe_open
from torch import Tensor, nn

from lhc_triton.runtime.network.accelerate import accelerate
from lhc_triton.runtime.network.accelerated import AcceleratedModel
from lhc_triton.runtime.saved.sealed_file import sealed


def run(module: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return module(*inputs)


def quick(model: nn.Module, *inputs: Tensor, backend: str = "torch") -> AcceleratedModel:
    return accelerate(model, inputs or image(size=16), backend=backend, tune="off")


def document_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["lhc_triton"])
        return document, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def rewrite_file(path: Path, document: Any, tensors: dict[str, Tensor]) -> None:
    """Write a file whose digest is right, so that what is in it has to be found wrong by itself."""
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(b"".join(sealed(text, tensors)))
