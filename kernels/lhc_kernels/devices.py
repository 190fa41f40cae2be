"""What a launch has to know about its device."""

from __future__ import annotations

import torch


def device_limits(device: torch.device) -> dict[str, int]:
    """Return the fields of a ``LaunchShape`` that the device sets; none, for its defaults, without a GPU.

    Asks for the device's properties, never for data, so nothing waits.
    """
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "processors": found.multi_processor_count,
        "shared_bytes": getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block,
        "capability": 0 if torch.version.hip else 10 * found.major + found.minor,
    }
