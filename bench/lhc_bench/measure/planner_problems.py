"""What the planner is measured on: layers and networks, and topologies as learning and chance make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lhc_bench.measure.cases import LayerCase, batch_of, layer_cases
from lhc_bench.measure.masks import random_mask
from lhc_triton.planning.schema import LayerTopology

IN_BLOCK, OUT_BLOCK = 32, 16
WIDE_MODEL = "wide-imagenet"
LAYERS = {
    "vgg16-imagenet": ("conv1_2", "conv2_2", "conv3_2", "conv4_2", "conv5_1"),
    "resnet50-imagenet": ("layer1.0.conv1", "layer3.0.conv2", "layer4.0.conv3"),
}
NETWORKS = ("vgg16-imagenet", "resnet50-imagenet")
# How alike learned patterns are is set by hand: a common liking for taps and blocks of channels, families of
# filters with a liking of their own, and what each filter group adds.
LIKING, FAMILY, OWN = 0.8, 1.0, 0.6
GROUPS_PER_FAMILY = 6
GROUPS_PER_PATTERN = 8


@dataclass(frozen=True)
class PlannerCase:
    """A layer, or all layers of a network behind the first.

    Attributes:
        model: the network and its input, or "wide-imagenet" for a layer that no network here has.
        layer: its name; "all" for a whole network.
        layers: that are planned, each as often as it occurs.
        out_block: filters that share one mask bit; 1 is the finest that planning knows.
    """

    model: str
    layer: str
    layers: tuple[LayerCase, ...]
    out_block: int = OUT_BLOCK

    @property
    def name(self) -> str:
        """Model and layer, and the blocks where they are not the usual ones."""
        blocks = "" if self.out_block == OUT_BLOCK else f", blocks of {self.out_block}"
        return f"{self.model}/{self.layer}{blocks}"

    def topologies(
        self, kind: str, density: float, device: str, seed: int, batch: int | None = None
    ) -> tuple[LayerTopology, ...]:
        """Draw the layers' topologies.

        Args:
            kind: one of `TOPOLOGIES`.
            density: wanted live share of the entries.
            device: "cpu" or "cuda", which sets the batch.
            seed: of the first layer; each takes the next one.
            batch: images, in the place of the device's.
        """
        found = []
        for index, case in enumerate(self.layers):
            geometry = case.geometry(batch or batch_of(case.model, device))
            groups = -(-case.out_channels // self.out_block)
            shape = (groups, -(-case.in_channels // IN_BLOCK), case.kernel, case.kernel)
            mask = TOPOLOGIES[kind](shape, density, seed + index)
            found.append(LayerTopology.from_mask(case.name, geometry, IN_BLOCK, self.out_block, mask))
        return tuple(found)


def planner_cases() -> tuple[PlannerCase, ...]:
    """Layers of VGG16 and ResNet50, one of 2,048 filters (in blocks, and each by itself), the networks."""
    layers = [case for model, wanted in LAYERS.items() for case in layer_cases(model) if case.layer in wanted]
    wide = LayerCase(WIDE_MODEL, "conv", 2048, 2048, 7, 7)
    networks = []
    for model in NETWORKS:
        every = tuple(case for case in layer_cases(model) for _ in range(case.count))
        networks.append(PlannerCase(model, "all", every[1:]))
    return (
        *(PlannerCase(case.model, case.layer, (case,)) for case in layers),
        PlannerCase(WIDE_MODEL, "conv", (wide,)),
        PlannerCase(WIDE_MODEL, "conv", (wide,), out_block=1),
        *networks,
    )


def independent(shape: tuple[int, int, int, int], density: float, seed: int) -> np.ndarray:
    """Every filter group draws its entries for itself: no two have more in common than chance gives them."""
    groups, blocks, kh, kw = shape
    return random_mask(groups, blocks, (kh, kw), density, 1, 1, seed=seed)


def few(shape: tuple[int, int, int, int], density: float, seed: int) -> np.ndarray:
    """Filter groups take one of few patterns, eight groups each in the mean, as consolidation leaves them."""
    groups, blocks, kh, kw = shape
    pool = independent((max(2, groups // GROUPS_PER_PATTERN), blocks, kh, kw), density, seed)
    return pool[np.random.default_rng(seed).integers(len(pool), size=groups)]


def correlated(shape: tuple[int, int, int, int], density: float, seed: int) -> np.ndarray:
    """Filter groups resemble each other, and families of them more so; some keep more entries than others.

    The largest scores live: the sum of a liking for taps and channels that the layer shares, of one that a
    family of groups shares, and of a group's own.
    """
    groups, blocks, kh, kw = shape
    rng = np.random.default_rng(seed)
    families = rng.normal(0, FAMILY, (max(2, groups // GROUPS_PER_FAMILY), blocks, kh * kw))
    score = rng.normal(0, LIKING / 2, (1, 1, kh * kw)) + rng.normal(0, LIKING, (1, blocks, 1))
    score = score + families[rng.integers(len(families), size=groups)]
    score = score + rng.normal(0, OWN, (groups, blocks, kh * kw)) + rng.normal(0, OWN / 2, (groups, 1, 1))
    rows = score.reshape(groups, -1)
    live = rows > np.quantile(rows, 1 - density)
    live[np.arange(groups), rows.argmax(axis=1)] = True  # no filter is dead
    return live.reshape(shape)


TOPOLOGIES: dict[str, Callable[[tuple[int, int, int, int], float, int], np.ndarray]] = {
    "correlated": correlated,
    "independent": independent,
    "few patterns": few,
}
"""Masks [filter groups, input blocks, kh, kw] of a density, by how alike the patterns are."""
