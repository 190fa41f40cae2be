"""Whether torch's own convolutions may round float32 products to TF32, as they do by default on a GPU."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Return torch's setting, whichever of its two interfaces the program has used."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set through the newer interface, the older one no longer answers
        return str(torch.backends.cudnn.conv.fp32_precision) != "ieee"  # type: ignore[attr-defined]
