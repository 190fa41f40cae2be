"""From a plain network to one that learns its topology, and back to numbers: convert, freeze, summary."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .errors import first_line
from .finite import all_finite
from .generators import generators_kept
from .layers import LHCConv2d
from .tables import aligned
from .takeover import own_forward, weight_in_force
from .topology import Effects, LHCConfig

FilterFn = Callable[[str, nn.Conv2d], bool]
ConfigFn = Callable[[str, nn.Conv2d], LHCConfig]
ModelT = TypeVar("ModelT", bound=nn.Module)

# The distance from the density target, as a share of it and at least, from which freeze warns.
_FAR_SHARE = 0.25
_FAR_LEAST = 0.02


def lhc_layers(model: nn.Module) -> dict[str, LHCConv2d]:
    """Return the LHCConv2d layers by name, in the order of model.named_modules(); shared ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LHCConv2d)}


def convert(
    model: ModelT,
    config: LHCConfig | ConfigFn | None = None,
    filter_fn: FilterFn | None = None,
    *,
    effects: Effects = "random",
) -> ModelT:
    """Turn a model's convolutions into LHCConv2d layers, in place, and return the model.

    Weight and bias stay the same Parameter objects, but an optimiser made before lacks the new `effects`
    parameters, and the topology would not learn: make it after. Device, dtype, training and requires_grad
    flags are kept, and so are hooks and what else was added to a convolution (see LHCConv2d.from_conv). What
    torch.nn.utils.prune has masked is 0 from then on, in the weight, not in the topology. A parametrised
    weight is taken as it is now, and a warning says so.

    The model's first convolution stays dense, as do subclasses of nn.Conv2d and convolutions with groups,
    another padding_mode, a forward that was replaced on the instance, or (for rigid shapes) an even kernel.
    A module that is used twice stays shared. Either all chosen layers are converted or, after an error, none.

    Args:
        model: any module that holds nn.Conv2d modules.
        config: blocks, shapes, density target; LHCConfig() by default. Or a function that is called as
            config(name, module) for every convolution that filter_fn takes, and returns its LHCConfig: see
            `blocks_by_width`.
        filter_fn: called as filter_fn(name, module) for every convolution that could be converted (to free
            shapes at least); return False to leave it dense.
        effects: where the topology starts: "random", as the method has it, or "magnitude": of a trained
            network, with that half of each layer's blocks whose weights are larger (see
            `topology.ordered_effects`).

    Raises:
        ValueError: the model has no convolution, none can be converted, a weight has NaN or infinity, effects
            is another word, or something of a chosen convolution cannot be carried over, such as a weight
            that is computed in a hook.
        TypeError: model or config is of another type, or the function returns something else.
    """
    if effects not in get_args(Effects):
        raise ValueError(f"effects={effects!r} is not supported: choose 'random' or 'magnitude'")
    chosen, _ = choose_layers(model, config, filter_fn)
    replacements = {conv: LHCConv2d.from_conv(conv, own) for conv, own in chosen.values()}
    if effects != "random":
        for layer in replacements.values():
            layer.reset_effects(effects)
    replace_layers(model, replacements)
    return model


def choose_layers(
    model: nn.Module, config: LHCConfig | ConfigFn | None = None, filter_fn: FilterFn | None = None
) -> tuple[dict[str, tuple[nn.Conv2d, LHCConfig]], dict[str, str]]:
    """Return the convolutions that `convert` would convert with their configs, and why it leaves the others.

    Args:
        model: as in `convert`.
        config: as in `convert`.
        filter_fn: as in `convert`.

    Raises:
        ValueError: as in `convert`.
        TypeError: as in `convert`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    config = LHCConfig() if config is None else config
    if not isinstance(config, LHCConfig) and not callable(config):
        raise TypeError(
            f"config={config!r} is not supported: give an LHCConfig, or a function that returns one"
        )
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to convert")

    chosen: dict[str, tuple[nn.Conv2d, LHCConfig]] = {}
    left: dict[str, str] = {}
    for index, (name, conv) in enumerate(convolutions):
        reason = "is the first convolution" if index == 0 else _why_dense(conv)
        if reason is None and filter_fn is not None and not filter_fn(name, conv):
            reason = "was left out by filter_fn"
        if reason is None:
            own = config if isinstance(config, LHCConfig) else _config_of(config, name, conv)
            reason = _why_not_rigid(conv) if own.shapes == "rigid" else None
        if reason is None:
            chosen[name] = (conv, own)
        else:
            left[name] = reason
    if not chosen:
        reasons = [f"{name or 'the model itself'} {reason}" for name, reason in left.items()]
        more = f", and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"no convolution of {type(model).__name__} can be converted: {'; '.join(reasons[:3])}{more}"
        )
    for name, (conv, _) in chosen.items():
        problem = LHCConv2d.why_not_from(conv)
        if problem is not None:
            raise ValueError(f"layer {name!r} {problem}; or leave it dense with filter_fn")
        if not conv.weight.is_meta and not all_finite(weight_in_force(conv)):
            raise ValueError(f"layer {name!r} has NaN or infinity in its weight: repair it before converting")
    return chosen, left


def replace_layers(model: nn.Module, replacements: Mapping[nn.Conv2d, nn.Conv2d]) -> None:
    """Put other layers in the place of a model's convolutions, wherever it holds them."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if isinstance(child, nn.Conv2d) and child in replacements:
                setattr(parent, child_name, replacements[child])


def blocks_by_width(config: LHCConfig, *, groups: int = 8, blocks: int = 8, largest: int = 128) -> ConfigFn:
    """Return a rule for `convert` that gives wide layers wide blocks.

    Patterns that many filters share run faster, but cost accuracy where a layer is narrow. So a layer's
    blocks are those of ``config``, doubled as often as leaves it ``groups`` filter groups and ``blocks``
    input blocks, and up to ``largest``. With in_block=32 and out_block=16, a layer of 64 or 128 filters keeps
    an out_block of 16, 256 filters get 32, 512 get 64, and 1024 or more 128. The rule and its numbers are
    ours.

    Args:
        config: density and shapes of every layer, and its smallest blocks.
        groups: filter groups that widening must leave, 1 or more.
        blocks: input blocks that widening must leave, 1 or more.
        largest: channels or filters of the widest block.

    Raises:
        ValueError: a number is below 1, or a block of ``config`` is wider than ``largest``.
        TypeError: a number is not an int.
    """
    for name, value in (("groups", groups), ("blocks", blocks), ("largest", largest)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is not an int: give 1 or more")
        if value < 1:
            raise ValueError(f"{name}={value} is not supported: give 1 or more")
    for name in ("in_block", "out_block"):
        if getattr(config, name) > largest:
            raise ValueError(
                f"{name}={getattr(config, name)} is above largest={largest}: give smaller blocks"
            )

    def widened(block: int, channels: int, parts: int) -> int:
        while 2 * block <= largest and 2 * block * parts <= channels:
            block *= 2
        return block

    def rule(name: str, conv: nn.Conv2d) -> LHCConfig:
        return replace(
            config,
            in_block=widened(config.in_block, conv.in_channels, blocks),
            out_block=widened(config.out_block, conv.out_channels, groups),
        )

    return rule


def _config_of(rule: ConfigFn, name: str, conv: nn.Conv2d) -> LHCConfig:
    config = rule(name, conv)
    if not isinstance(config, LHCConfig):
        raise TypeError(f"the config function returned {config!r} for layer {name!r}: return an LHCConfig")
    return config


def _why_dense(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be converted, or None."""
    if isinstance(conv, LHCConv2d):
        return "is an LHCConv2d already"
    kind = type_before_parametrizations(conv)
    if kind is not nn.Conv2d:
        return f"is a {kind.__name__}, not exactly nn.Conv2d"
    if own_forward(conv):
        return "has a forward of its own"
    if conv.groups != 1:
        return f"has groups={conv.groups} (supported: 1)"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r} (supported: 'zeros')"
    return None


def _why_not_rigid(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot have rigid shapes, or None."""
    if not all(size % 2 for size in conv.kernel_size):
        return f"has the even kernel_size={conv.kernel_size} (rigid shapes need odd ones)"
    return None


def freeze(model: ModelT, *, entry_costs: Mapping[str, float] | None = None) -> ModelT:
    """End the coarse stage: fix the topology of every LHCConv2d, in place, and return the model.

    A warning says so where what the layers have learned ends far from their density target: by more than a
    quarter of it, and by more than 0.02. Layers that are frozen already cause none.

    Args:
        model: a converted network.
        entry_costs: what the TopologySchedule got, if it steered the live share of a cost to the target.

    Raises:
        ValueError: the model has no LHCConv2d, a layer's effects have NaN or infinity, or the costs are not
            those of the LHC layers; no layer is frozen then.
    """
    layers = lhc_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LHCConv2d: call convert() before freeze()")
    costs = None if entry_costs is None else checked_costs(entry_costs, layers)
    for name, layer in layers.items():
        if not layer.frozen and not all_finite(layer.effects):
            raise ValueError(
                f"layer {name!r} has NaN or infinity in its effects: go back to an earlier checkpoint"
            )
    _warn_where_far(layers, costs)
    for layer in layers.values():
        layer.freeze()
    return model


def _warn_where_far(layers: Mapping[str, LHCConv2d], costs: Mapping[str, float] | None) -> None:
    """Warn where the layers that learned, and all together, miss the density target to the same side.

    The penalty steers all layers as one: what learned may lie off the target to make up for what was fixed.
    """
    found = _density_and_target(layers, costs)
    learned = _density_and_target({n: layer for n, layer in layers.items() if not layer.frozen}, costs)
    if found is None or learned is None:
        return
    gap, learned_gap = (density - target for density, target in (found, learned))
    allowed = far_from(found[1])
    if min(abs(gap), abs(learned_gap)) > allowed and (gap > 0) == (learned_gap > 0):
        warnings.warn(
            f"the density at freeze() is {found[0]:.3f}, far from its target {found[1]:.3f}. Likely causes:"
            " an optimiser made before convert(), a loss without schedule.penalty(), too few epochs, or"
            " blocks so large that the one entry each filter group keeps is above the target",
            stacklevel=3,
        )


def far_from(target: float) -> float:
    """Return the distance from a density target that is worth a warning."""
    return max(_FAR_SHARE * target, _FAR_LEAST)


def _density_and_target(
    layers: Mapping[str, LHCConv2d], costs: Mapping[str, float] | None
) -> tuple[float, float] | None:
    """Live share of the weights (or of their costs) in layers with a target, and the target; None without."""
    steered = {name: layer for name, layer in layers.items() if layer.config.density is not None}
    sizes = {n: layer.weight.numel() * (1.0 if costs is None else costs[n]) for n, layer in steered.items()}
    whole = sum(sizes.values())
    if whole == 0:
        return None
    live = sum(size * steered[name].density for name, size in sizes.items())
    return live / whole, sum(size * (steered[n].config.density or 0.0) for n, size in sizes.items()) / whole


def check_amount(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless a value is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is not a number: give a finite one, 0 or more")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} is not supported: give a finite number, 0 or more")


def checked_costs(costs: Mapping[str, float], layers: Mapping[str, LHCConv2d]) -> dict[str, float]:
    """Return the costs of live weights in the order of the layers; ValueError or TypeError if they misfit."""
    if set(costs) != set(layers):
        missing, unknown = sorted(set(layers) - set(costs)), sorted(set(costs) - set(layers))
        raise ValueError(
            f"entry_costs lacks the layers {missing} and has unknown ones {unknown}: give one cost for each"
            " LHC layer, by its name in lhc_layers(model)"
        )
    for name, cost in costs.items():
        check_amount(f"entry_costs[{name!r}]", cost)
    if not any(costs.values()):
        raise ValueError("entry_costs are all 0: give at least one layer a cost")
    return {name: float(costs[name]) for name in layers}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no_grad; training flags and random states are put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    try:
        model.eval()
        with torch.no_grad(), generators_kept(devices):
            yield
    finally:
        for module, training in flags:
            module.training = training


def output_pixels(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], kinds: tuple[type[nn.Module], ...]
) -> dict[str, int]:
    """Run the model once and count the positions that its layers compute, over the batch and all calls.

    For a convolution that is N * H * W of its output, for a linear layer the rows of its output: times the
    number of weights, it gives the MACs. The run is in eval mode without gradients; training flags and
    random states are left as they were.

    Args:
        model: the network.
        example_input: its input, or the tuple of its inputs.
        kinds: types of the modules to look at.

    Returns:
        Positions by module name; 0 for modules that the run does not reach.

    Raises:
        ValueError: the model does not run on the example.
        TypeError: the example is neither a tensor nor a tuple.
    """
    if not isinstance(example_input, Tensor | tuple):
        raise TypeError(
            f"example_input is a {type(example_input).__name__}: give a tensor, or the tuple of the inputs"
        )
    watched = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    pixels = dict.fromkeys(watched.values(), 0)

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        channels = output.shape[-3 if isinstance(module, nn.Conv2d) else -1]
        pixels[watched[module]] += output.numel() // max(channels, 1)

    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    handles = [module.register_forward_hook(count) for module in watched]
    try:
        with evaluating(model):
            model(*inputs)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs if isinstance(i, Tensor))
        raise ValueError(
            f"{type(model).__name__} does not run on an input of shape {shapes}: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return pixels


@dataclass(frozen=True)
class SummaryRow:
    """One layer, or a total, of a Summary.

    Attributes:
        layer: the module's name.
        kind: "lhc", "conv" (a dense convolution), "linear", or "total".
        weights: weights of the dense layer, bias not counted.
        live_weights: weights that the topology keeps.
        macs: multiply-accumulates of the dense layer for one input.
        live_macs: multiply-accumulates that the topology keeps.
        density: live_weights / weights.
        patterns: distinct patterns among the filter groups (1 for a dense layer; their sum in a total).
        rescued: filter groups that were kept from losing every entry.
    """

    layer: str
    kind: str
    weights: int
    live_weights: int
    macs: int
    live_macs: int
    density: float
    patterns: int
    rescued: int


@dataclass(frozen=True)
class Summary:
    """What a network's layers weigh and compute.

    Attributes:
        rows: one per LHCConv2d, nn.Conv2d and nn.Linear, in the order of model.named_modules().
        converted: the total over the LHCConv2d layers.
        total: the total over all rows.
    """

    rows: tuple[SummaryRow, ...]
    converted: SummaryRow
    total: SummaryRow

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain dicts, lists and numbers, ready for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "converted": asdict(self.converted),
            "total": asdict(self.total),
        }

    def __str__(self) -> str:
        header = ("layer", "kind", "weights", "live", "MACs", "live MACs", "density", "patterns", "rescued")
        lines = [header, *map(_cells, self.rows), _cells(self.converted), _cells(self.total)]
        texts = aligned(lines, left=2)
        rule = "-" * len(texts[0])
        texts = [text.rstrip() for text in texts]
        return "\n".join([texts[0], rule, *texts[1:-2], rule, *texts[-2:]])


def _cells(row: SummaryRow) -> tuple[str, ...]:
    counts = (row.weights, row.live_weights, row.macs, row.live_macs)
    return (
        row.layer,
        row.kind,
        *(f"{count:,}" for count in counts),
        f"{row.density:.4f}",
        str(row.patterns),
        str(row.rescued),
    )


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Count weights, MACs, density and distinct patterns of every layer, by the masks in force.

    During the warm-up this is the learned topology, not the mixture that runs.

    Args:
        model: the network; run once, in eval mode, on zeros of its first parameter's device and dtype.
        input_size: (C, H, W), or (N, C, H, W); MACs are those of one image.

    Raises:
        ValueError: the size is wrong, or the model has no convolution or does not run on it.
    """
    size = tuple(input_size)
    if len(size) not in (3, 4) or not all(isinstance(s, int) and s > 0 for s in size):
        raise ValueError(f"input_size={size} is not supported: give (C, H, W) of positive ints")
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not any(isinstance(module, nn.Conv2d) for module in layers.values()):
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d: there is nothing to summarise")
    parameter = next(model.parameters())
    example = torch.zeros(1, *size[-3:], device=parameter.device, dtype=parameter.dtype)
    pixels = output_pixels(model, example, kinds)
    rows = tuple(_row(name, module, pixels[name]) for name, module in layers.items())
    return Summary(rows, _total("converted", [r for r in rows if r.kind == "lhc"]), _total("all", rows))


def _row(name: str, module: nn.Module, pixels: int) -> SummaryRow:
    assert isinstance(module.weight, Tensor)
    weights = module.weight.numel()
    live, patterns, rescued, kind = weights, 1, 0, "conv" if isinstance(module, nn.Conv2d) else "linear"
    if isinstance(module, LHCConv2d):
        with torch.no_grad():
            live, kind, rescued = int(module.live_weights()), "lhc", module.rescued
            patterns = len(torch.unique(module.block_mask().flatten(1) != 0, dim=0))
    return SummaryRow(
        name, kind, weights, live, weights * pixels, live * pixels, live / max(weights, 1), patterns, rescued
    )


def _total(name: str, rows: Sequence[SummaryRow]) -> SummaryRow:
    weights, live = sum(r.weights for r in rows), sum(r.live_weights for r in rows)
    return SummaryRow(
        layer=name,
        kind="total",
        weights=weights,
        live_weights=live,
        macs=sum(r.macs for r in rows),
        live_macs=sum(r.live_macs for r in rows),
        density=live / weights if weights else 1.0,
        patterns=sum(r.patterns for r in rows),
        rescued=sum(r.rescued for r in rows),
    )
