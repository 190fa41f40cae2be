"""One-shot pruning of trained networks by blocks, and the way back to plain convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .conversion import (
    ConfigFn,
    FilterFn,
    ModelT,
    choose_layers,
    lhc_layers,
    output_pixels,
    replace_layers,
)
from .layers import LHCConv2d
from .planning.cost import CostModel
from .planning.extract import call_geometries
from .selection import Choices, Clock, Masks, Share, select, share_of_costs
from .tables import aligned
from .takeover import weight_in_force
from .topology import LHCConfig

Objective = Literal["weights", "macs", "latency"]
Scope = Literal["network", "layer"]
Norm = Literal["l1", "l2"]

# Ours: input blocks are halved down to this many channels where a filter group has too few entries.
LEAST_IN_BLOCK = 8

_NAMES = {"weights": "weights", "macs": "MACs", "latency": "predicted time"}
Chosen = dict[str, tuple[nn.Conv2d, LHCConfig]]


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning left of one layer.

    Attributes:
        layer: the module's name.
        in_block: input channels of a block.
        out_block: filters of a group.
        weights: weights of the dense layer, bias not counted.
        live_weights: weights that are left.
        macs: multiply-accumulates of the dense layer on the example.
        live_macs: multiply-accumulates that are left.
        density: live_weights / weights.
        lost: share of the layer's score that went with the blocks: by default, of the sum of its squared
            weights.
    """

    layer: str
    in_block: int
    out_block: int
    weights: int
    live_weights: int
    macs: int
    live_macs: int
    density: float
    lost: float


@dataclass(frozen=True)
class PruningReport:
    """What `prune` did.

    Attributes:
        objective: what the budget was a share of: "weights", "macs" or "latency".
        budget: the share that was asked for.
        kept: the share that is left.
        layers: the pruned layers, in the order of model.named_modules().
        skipped: (name, reason) of the convolutions that were left as they are.
    """

    objective: str
    budget: float
    kept: float
    layers: tuple[PrunedLayer, ...]
    skipped: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and numbers, ready for JSON."""
        return {
            "objective": self.objective,
            "budget": self.budget,
            "kept": self.kept,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [{"layer": name, "reason": reason} for name, reason in self.skipped],
        }

    def __str__(self) -> str:
        rows = [("layer", "blocks", "weights", "live", "density", "lost")]
        rows += [
            (
                row.layer,
                f"{row.in_block}x{row.out_block}",
                f"{row.weights:,}",
                f"{row.live_weights:,}",
                f"{row.density:.3f}",
                f"{row.lost:.3f}",
            )
            for row in self.layers
        ]
        lines = aligned(rows)
        lines += [f"left as it is: {name or 'the model itself'} {reason}" for name, reason in self.skipped]
        lines.append(
            f"kept {self.kept:.3f} of the {_NAMES[self.objective]} of these layers; the budget was"
            f" {self.budget:.3f}"
        )
        return "\n".join(lines)


def prune(
    model: ModelT,
    example_input: Tensor | tuple[Tensor, ...],
    config: LHCConfig | ConfigFn | None = None,
    *,
    budget: float | None = None,
    objective: Objective = "weights",
    scope: Scope = "network",
    scores: Norm | Mapping[str, Tensor] = "l2",
    filter_fn: FilterFn | None = None,
    cost: CostModel | None = None,
    report: Callable[[PruningReport], object] | None = None,
) -> ModelT:
    """Keep the best blocks of a trained network's convolutions, in place, and return the model.

    The convolutions that `convert` would convert become frozen LHCConv2d layers, ready to be fine-tuned.
    LHCConv2d layers that are there keep their blocks, and lose some more. A block's score is the mean over
    its weights; the best blocks by score and what they cost stay, until the budget is spent. Every filter
    group keeps at least one entry; blocks of score 0 go in any case, so the budget need not be spent whole.
    The first convolution stays dense.

    Where ``config`` is an LHCConfig, layers with few entries in a filter group, such as 1x1 shortcuts, get
    narrower input blocks: halved, down to 8 channels, until there are ``1 / budget`` entries to choose from.

    Args:
        model: a trained network of nn.Conv2d, LHCConv2d, or both.
        example_input: its input, or the tuple of its inputs; run once, in eval mode. Its batch and image size
            are those that MACs and latency are for.
        config: blocks and shapes, LHCConfig() by default, or a function as for `convert`.
        budget: the share of the objective that may stay, over the layers that are pruned, in (0, 1]; by
            default the config's density, if that is an LHCConfig.
        objective: "weights", "macs", or "latency": the time that the planner predicts, relative to the same
            layers run dense.
        scope: "network" compares the blocks of all layers, "layer" leaves each layer the same share, but
            no less than an entry for each filter group.
        scores: "l2" scores a weight by its square, "l1" by its magnitude; or scores of your own by layer
            name, of every pruned layer, [O, I, kh, kw], 0 or more.
        filter_fn: called as filter_fn(name, module) for every convolution that could be pruned; return False
            to leave it as it is.
        cost: predicts the latency; by default the model of the fastest backend of the example's device kind.
        report: called with a PruningReport once the model is pruned; ``print`` shows it.

    Raises:
        ValueError: an argument is out of range, the budget cannot be reached (the least that can is named),
            the model does not run on the example, or `convert` would refuse it; nothing is changed then.
        TypeError: an argument has the wrong type.
    """
    for name, value, words in (("objective", objective, Objective), ("scope", scope, Scope)):
        if value not in get_args(words):
            raise ValueError(
                f"{name}={value!r} is not supported: choose {' or '.join(map(repr, get_args(words)))}"
            )
    budget = _checked_budget(budget, config)
    chosen, skipped = _choose(model, config, filter_fn, budget)
    weight_scores = _weight_scores(chosen, scores)
    pixels = output_pixels(model, example_input, (nn.Conv2d,))
    if objective != "weights" and not any(pixels[name] for name in chosen):
        raise ValueError("example_input reaches none of the layers to prune: give an input that does")
    units, share = _objective(model, example_input, objective, chosen, pixels, cost)
    layers = [
        Choices.of(name, conv, own, weight_scores[name], units[name]) for name, (conv, own) in chosen.items()
    ]
    masks: Masks = {}
    least = share(layers, {layer.name: layer.mask(math.inf) for layer in layers})
    if least > budget:
        raise ValueError(
            f"budget={budget:g} cannot be reached: one entry in each filter group takes"
            f" {math.ceil(1e4 * least) / 1e4:.4f} of the {_NAMES[objective]}; give that or more, or smaller"
            " blocks"
        )
    for part in [layers] if scope == "network" else [[layer] for layer in layers]:
        masks |= select(part, budget, share, fill=objective != "latency")
    found = PruningReport(
        objective,
        budget,
        share(layers, masks),
        tuple(_row(layer, masks[layer.name], pixels[layer.name]) for layer in layers),
        tuple(skipped.items()),
    )
    fresh = {conv: LHCConv2d.from_conv(conv, own) for conv, own in chosen.values() if not _learns(conv)}
    replace_layers(model, fresh)
    for name, mask in masks.items():
        conv = chosen[name][0]
        layer = fresh.get(conv, conv)
        assert isinstance(layer, LHCConv2d)
        layer.set_topology(mask, allow_dead=True)
    if report is not None:
        report(found)
    return model


def to_dense(model: ModelT) -> ModelT:
    """Give a model plain nn.Conv2d layers in place of its LHCConv2d, in place, and return the model.

    What their topology does not keep becomes 0 in the weight: outputs stay the same (those of the masks in
    force, during the warm-up as well). Weight and bias stay the same Parameter objects, hooks and flags are
    kept, and the effects are gone. Other tools read the result, and `accelerate` finds the zeros in it.

    Raises:
        ValueError: the model has no LHCConv2d, or is one itself: take its `to_conv()`.
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    layers = lhc_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LHCConv2d: it is dense already")
    if isinstance(model, LHCConv2d):
        raise ValueError("the model is an LHCConv2d itself: take its to_conv()")
    replace_layers(model, {layer: layer.to_conv() for layer in layers.values()})
    return model


def _checked_budget(budget: float | None, config: LHCConfig | ConfigFn | None) -> float:
    if budget is None:
        if callable(config):
            raise ValueError("budget is not given: with a config function, give the share to keep, in (0, 1]")
        budget = (config or LHCConfig()).density
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget={budget!r} is not a number: give the share to keep, in (0, 1]")
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} is out of range: give the share to keep, in (0, 1]")
    return float(budget)


def _learns(conv: nn.Module) -> bool:
    return isinstance(conv, LHCConv2d)


def _choose(
    model: nn.Module, config: LHCConfig | ConfigFn | None, filter_fn: FilterFn | None, budget: float
) -> tuple[Chosen, dict[str, str]]:
    """Return the layers to prune with their blocks, and why the others are left."""
    wanted = LHCConfig() if config is None else config

    def fitted(name: str, conv: nn.Conv2d) -> LHCConfig:
        assert isinstance(wanted, LHCConfig)
        in_block = min(wanted.in_block, conv.in_channels)
        while in_block >= 2 * LEAST_IN_BLOCK and (
            math.ceil(conv.in_channels / in_block) * math.prod(conv.kernel_size) < 1 / budget
        ):
            in_block //= 2
        return replace(wanted, in_block=in_block) if in_block < wanted.in_block else wanted

    ours = lhc_layers(model) if isinstance(model, nn.Module) else {}
    try:
        chosen, left = choose_layers(model, fitted if isinstance(wanted, LHCConfig) else wanted, filter_fn)
    except ValueError:
        if not ours:
            raise
        chosen, left = {}, {}
    again = {n: (m, m.config) for n, m in ours.items() if filter_fn is None or filter_fn(n, m)}
    left = {name: reason for name, reason in left.items() if name not in again}
    return {**chosen, **again}, left


def _weight_scores(chosen: Chosen, scores: Norm | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the score of every weight, [O, I, kh, kw]; TypeError or ValueError if those given misfit."""
    if isinstance(scores, str):
        if scores not in get_args(Norm):
            raise ValueError(f"scores={scores!r} is not supported: choose 'l2' or 'l1', or give your own")
        power = 1 if scores == "l1" else 2
        return {name: weight_in_force(conv).detach().abs().pow(power) for name, (conv, _) in chosen.items()}
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores is a {type(scores).__name__}: give 'l2', 'l1' or tensors by layer name")
    for name, (conv, _) in chosen.items():
        own = scores.get(name)
        if not isinstance(own, Tensor) or own.shape != conv.weight.shape:
            given = "none" if own is None else str(tuple(getattr(own, "shape", ())))
            raise ValueError(
                f"scores of layer {name!r}: {given} given, {tuple(conv.weight.shape)} needed; leave layers"
                " out with filter_fn"
            )
        if not bool((torch.isfinite(own) & (own >= 0)).all()):
            raise ValueError(f"scores of layer {name!r} are not all finite and 0 or more")
    return {name: scores[name].detach() for name in chosen}


def _objective(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    objective: Objective,
    chosen: Chosen,
    pixels: Mapping[str, int],
    cost: CostModel | None,
) -> tuple[dict[str, float], Share]:
    """Return what one weight of each layer costs, and how to find the share that masks leave of all costs."""
    if objective == "weights":
        return dict.fromkeys(chosen, 1.0), share_of_costs
    if objective == "macs":
        return {name: float(pixels[name]) for name in chosen}, share_of_costs
    calls = call_geometries(model, example_input)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    clock = Clock(
        cost or CostModel.for_device(device), {name: calls[name] for name in chosen if name in calls}
    )
    dtypes = {name: str(conv.weight.dtype).removeprefix("torch.") for name, (conv, _) in chosen.items()}
    units = {name: clock.weight_us(name, own, dtypes[name]) for name, (_, own) in chosen.items()}
    return units, partial(clock.share, dtypes)


def _row(layer: Choices, mask: Tensor, pixels: int) -> PrunedLayer:
    weights, live = layer.weights, layer.live_weights(mask)
    return PrunedLayer(
        layer.name,
        layer.config.in_block,
        layer.config.out_block,
        weights,
        live,
        weights * pixels,
        live * pixels,
        live / weights,
        layer.lost(mask),
    )
