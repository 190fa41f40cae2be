"""The networks that commands take by name or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_BATCH = 4096  # planning runs the network once on so many images
SHIPPED = ("lhc", "dense")


def plan_of(
    network: str,
    batch: int | None = None,
    backend: str = "auto",
    usual_batch: int = 1,
    device: Any = "cpu",
    dtype: Any = None,
) -> Any:
    """Plan a shipped network or trained weights; an artefact brings its own plan."""
    import torch

    import lhc_triton as lhc
    from lhc_triton.artifact import is_artifact
    from lhc_triton.models.pretrained import load_network, pretrained_path

    if batch is not None and not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch is {batch}; it must be from 1 to {MAX_BATCH}")
    if network in SHIPPED:
        saved = load_network(pretrained_path(network))  # type: ignore[arg-type]
    elif not Path(network).exists():
        raise FileNotFoundError(
            f"no network {network!r}; give one of {', '.join(SHIPPED)}, or an existing file"
        )
    elif is_artifact(network):
        if batch is not None or backend != "auto":
            raise ValueError(f"{network} brings its own plan: leave --batch and --backend out")
        return lhc.load(network, device=device).plan
    else:
        saved = load_network(network)
    made = saved.architecture
    size = (batch or usual_batch, made.in_channels, made.image_size, made.image_size)
    image = torch.zeros(size, device=device, dtype=dtype)
    return lhc.plan(saved.model.to(device, dtype), image, backend=backend)
