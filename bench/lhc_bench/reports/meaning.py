"""Which training settings mean something beside each other."""

from __future__ import annotations

from lhc_triton.training.config import OF_PRUNED, OF_TARGET

WITH_PARTS = ("groupwise", "hetconv", "stripe", "1xn")
"""The topologies made by hand that TrainConfig.parts says something of."""

OF_BLOCKS = ("density", "in_block", "out_block", "block_rule", "share")
"""Settings that a topology made by hand does not have; it has its own blocks."""

OF_COARSE = ("shapes", "warmup_epochs", "effect_lr")
"""Settings that only a topology which is learned has."""


def idle_settings(topology: str, steered: bool) -> frozenset[str]:
    """The settings of a TrainConfig that change nothing in its run.

    Args:
        topology: the run's.
        steered: whether it has a density.
    """
    learned, pruned = topology == "learned", topology == "pruned"
    of_target = () if learned and steered else OF_TARGET.keys() - (OF_PRUNED if pruned else ())
    return frozenset(
        {
            *(() if topology in WITH_PARTS else ("parts",)),
            *(() if learned or pruned else OF_BLOCKS),
            *(() if learned else OF_COARSE),
            *(("start",) if pruned else ()),
            *of_target,
        }
    )
