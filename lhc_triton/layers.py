"""LHCConv2d: a convolution that learns which of its weights live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .finite import all_finite
from .masking import apply_mask
from .takeover import added_attributes, own_forward, take_over, why_not_taken_over
from .topology import (
    Effects,
    LHCConfig,
    block_grid,
    block_means,
    count_weights,
    effect_spread,
    expand_mask,
    learned_mask,
    ordered_effects,
    rescued_groups,
    rigid_shapes,
)

_STATE_VERSION = 1
_OWN = frozenset({"effects", "topology", "masked_filters", "rigid", "config", "_frozen"})


class LHCConv2d(nn.Conv2d):
    """A 2-D convolution ``y = conv(x, weight * mask) + bias`` whose binary mask is learned.

    The mask is shared over blocks of ``in_block`` adjacent input channels and ``out_block`` adjacent
    filters, per kernel tap, and comes from the parameter `effects` (Learnable Heterogeneous Convolution,
    arXiv 2301.05440). Dead weights get no gradient. Once frozen, the buffer `topology` is the mask, and the
    effects neither get gradients nor move.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: int or (kh, kw); odd for rigid shapes.
        stride: as in nn.Conv2d.
        padding: as in nn.Conv2d: int, pair, "valid" or "same".
        dilation: as in nn.Conv2d.
        groups: only 1.
        bias: whether there is a bias [O].
        padding_mode: only "zeros".
        device: as in nn.Conv2d.
        dtype: as in nn.Conv2d.
        config: blocks, shapes and the density target; LHCConfig() by default.

    Attributes:
        weight: Parameter [O, I, kh, kw].
        bias: Parameter [O] or None.
        effects: Parameter [Go, Gi, kh, kw] (free shapes) or [Go, Gi, S] (rigid shapes), He-normal.
        topology: bool buffer [Go, Gi, kh, kw], the block mask in force once frozen.
        masked_filters: bool buffer [O]; the filters that use their mask, the others run dense (warm-up).

    Raises:
        ValueError: groups, padding_mode or an even kernel with rigid shapes, which are not supported.
        TypeError: config is not an LHCConfig.
    """

    effects: nn.Parameter
    topology: Tensor
    masked_filters: Tensor
    rigid: Tensor | None
    config: LHCConfig
    _frozen: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        config: LHCConfig | None = None,
    ) -> None:
        config = LHCConfig() if config is None else config
        if not isinstance(config, LHCConfig):
            raise TypeError(f"config={config!r} is not supported: give an LHCConfig")
        if groups != 1:
            raise ValueError(f"groups={groups} is not supported by LHCConv2d: use groups=1, or nn.Conv2d")
        if padding_mode != "zeros":
            raise ValueError(
                f"padding_mode={padding_mode!r} is not supported by LHCConv2d: use 'zeros', or nn.Conv2d"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=1,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.config = config
        self._frozen = False
        self._create_topology(self.weight.device, self.weight.dtype)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: LHCConfig | None = None) -> LHCConv2d:
        """Return a layer that takes over the convolution's weight and bias: the same Parameter objects.

        Device, dtype and training flag are kept. Hooks go over with the handles that remove them, and so do
        attributes, buffers and parameters that were added. A torch.nn.utils.prune mask becomes permanent:
        what it has pruned starts as 0 in a topology that does not know of it, and may grow. A parametrised
        weight is taken as it is now, with a warning.

        Raises:
            ValueError: something cannot be carried over: a weight that is computed in a hook (the old weight
                norm and spectral norm), a forward of the instance's own, a bound method as a hook, an
                attribute with a name of this class.
        """
        problem = cls.why_not_from(conv)
        if problem is not None:
            raise ValueError(f"the convolution {problem}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
            dtype=conv.weight.dtype,
            config=config,
        )
        take_over(conv, layer)
        layer._create_topology(conv.weight.device, conv.weight.dtype)
        return layer.train(conv.training)

    @classmethod
    def why_not_from(cls, conv: nn.Conv2d) -> str | None:
        """Say what of a convolution `from_conv` cannot take over, and what to do about it, or None."""
        return why_not_taken_over(conv, {*dir(cls), *cls.__annotations__})

    def to_conv(self) -> nn.Conv2d:
        """Return a plain convolution with this layer's parameters and hooks, dead weights set to 0.

        Weight and bias are the same Parameter objects: the dead weights become 0 in place. Attributes that
        were added go over, as in `from_conv`.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            bias=self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        take_over(self, conv, leave=_OWN)
        with torch.no_grad():
            conv.weight.copy_(self.masked_weight())
        return conv.train(self.training)

    def _create_topology(self, device: torch.device, dtype: torch.dtype) -> None:
        grid = block_grid(self.out_channels, self.in_channels, self.config.in_block, self.config.out_block)
        rigid = rigid_shapes(self.kernel_size) if self.config.shapes == "rigid" else None  # type: ignore[arg-type]
        entries = tuple(self.kernel_size) if rigid is None else (len(rigid),)
        self.register_buffer("rigid", None if rigid is None else rigid.to(device), persistent=False)
        self.register_buffer(
            "topology", torch.ones(*grid, *self.kernel_size, dtype=torch.bool, device=device)
        )
        self.register_buffer("masked_filters", torch.ones(self.out_channels, dtype=torch.bool, device=device))
        self.effects = nn.Parameter(torch.empty(*grid, *entries, device=device, dtype=dtype))
        self.reset_effects()

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Conv2d does, and the effects as `reset_effects` does."""
        super().reset_parameters()
        if "effects" in self._parameters:
            self.reset_effects()

    @torch.no_grad()
    def reset_effects(self, effects: Effects = "random") -> None:
        """Draw the effects He-normal: about half of all entries of free shapes live. Ends a freeze.

        fan_in is kh * kw * Gi for free shapes and S * Gi for rigid ones. With "magnitude", the effects have
        the same distribution and the order of the blocks' magnitudes: see `topology.ordered_effects`.
        """
        if effects == "magnitude":
            means = block_means(self.weight.square(), self.config.in_block, self.config.out_block)
            self.effects.copy_(ordered_effects(means, self.rigid))
        else:
            self.effects.normal_(0.0, effect_spread(self.effects))
        self._set_frozen(False)
        self._refresh_topology()

    @property
    def frozen(self) -> bool:
        """Whether the topology is fixed; carried in the state_dict."""
        return self._frozen

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        self.effects.requires_grad_(not frozen)
        if frozen:
            self.effects.grad = None

    @torch.no_grad()
    def _refresh_topology(self) -> None:
        self.topology.copy_(learned_mask(self.effects, self.rigid) != 0)

    def freeze(self) -> None:
        """Fix the topology that the effects now stand for; all filters use their masks from here on.

        Raises:
            ValueError: the effects have NaN or infinity: training has diverged.
        """
        if not self._frozen:
            if not all_finite(self.effects):
                raise ValueError("the effects have NaN or infinity: go back to an earlier checkpoint")
            self._refresh_topology()
        self.masked_filters.fill_(True)
        self._set_frozen(True)

    def set_topology(self, block_mask: Tensor, allow_dead: bool = False) -> None:
        """Replace the topology and freeze it; the effects are left as they are and rule no more.

        This is how a topology from elsewhere comes in: a handcrafted one, or one that was reworked between
        the coarse and the fine stage. Nothing is changed where an error is raised.

        Args:
            block_mask: [Go, Gi, kh, kw], bool or zeros and ones, on any device.
            allow_dead: whether filter groups may be empty; their filters then put out their bias.

        Raises:
            ValueError: the shape does not fit, a value is neither 0 nor 1, or a filter group is empty.
            TypeError: block_mask is not a tensor.
        """
        if not isinstance(block_mask, Tensor):
            raise TypeError(f"block_mask is a {type(block_mask).__name__}: give a tensor of zeros and ones")
        if block_mask.shape != self.topology.shape:
            raise ValueError(
                f"block_mask has shape {tuple(block_mask.shape)}: this layer needs"
                f" {tuple(self.topology.shape)} (filter groups, input blocks, kh, kw)"
            )
        if not bool(((block_mask == 0) | (block_mask == 1)).all()):
            raise ValueError("block_mask has values other than 0 and 1: give a bool mask")
        dead = int((~(block_mask != 0).flatten(1).any(dim=1)).sum())
        if dead and not allow_dead:
            raise ValueError(
                f"block_mask leaves {dead} of {len(block_mask)} filter groups without an entry: keep one in"
                " each, or give allow_dead=True"
            )
        self.topology.copy_(block_mask.detach() != 0)
        self.masked_filters.fill_(True)
        self._set_frozen(True)

    def block_mask(self) -> Tensor:
        """Return the block mask in force, zeros and ones of the weight's dtype, [Go, Gi, kh, kw].

        Learned and differentiable (straight through to the effects) until frozen; then the topology. The
        warm-up's mixture is not in it.
        """
        mask = self.topology if self._frozen else learned_mask(self.effects, self.rigid)
        return mask.to(self.weight.dtype)

    def mask(self) -> Tensor:
        """Return the mask in force, zeros and ones of the weight's dtype, [O, I, kh, kw]; no mixture."""
        config = self.config
        return expand_mask(
            self.block_mask(), self.out_channels, self.in_channels, config.in_block, config.out_block
        )

    def masked_weight(self) -> Tensor:
        """Return weight * mask, [O, I, kh, kw], in the weight's memory format; no mixture."""
        return apply_mask(self.weight, self.block_mask(), self.config.in_block, self.config.out_block)

    def _weight_in_force(self) -> Tensor:
        """Return masked_weight(), those filters whole that the warm-up leaves dense.

        Under autocast it has the type that the convolution would turn it into.
        """
        if self._frozen and type(self).masked_weight is not LHCConv2d.masked_weight:
            return self.masked_weight()  # a subclass computes it in a way of its own
        dtype, device = self.weight.dtype, self.weight.device.type
        if dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        mixture = None if self._frozen else self.masked_filters
        blocks = self.config.in_block, self.config.out_block
        return apply_mask(self.weight, self.block_mask(), *blocks, mixture, dtype)

    def live_weights(self) -> Tensor:
        """Return the number of live weights (bias not counted) as a differentiable float64 scalar."""
        config = self.config
        return count_weights(
            self.block_mask(), self.out_channels, self.in_channels, config.in_block, config.out_block
        )

    @property
    def density(self) -> float:
        """Live share of the weights, by the mask in force."""
        with torch.no_grad():
            return float(self.live_weights()) / self.weight.numel()

    @property
    def rescued(self) -> int:
        """Filter groups that the effects alone would have left empty; 0 under a topology set from outside."""
        with torch.no_grad():
            if self._frozen and not torch.equal(learned_mask(self.effects, self.rigid) != 0, self.topology):
                return 0
            return rescued_groups(self.effects, self.rigid)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve input [N, I, H, W] (or [I, H, W]) with the masked weight; the warm-up's mixture holds."""
        return self._conv_forward(input, self._weight_in_force(), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self._frozen:
            self._refresh_topology()  # so that whoever reads the file finds the topology in it
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _identity(self) -> list[int]:
        config = self.config
        return [_STATE_VERSION, config.in_block, config.out_block, int(config.shapes == "rigid")]

    def get_extra_state(self) -> Tensor:
        """Return int64 [5]: format version, in_block, out_block, rigid or not, frozen or not."""
        return torch.tensor([*self._identity(), int(self._frozen)], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the frozen state; ValueError if the state is of another kind of layer."""
        if not isinstance(state, Tensor) or state.shape != (5,) or state.dtype != torch.int64:
            raise ValueError(
                "the state of an LHCConv2d is not int64 [5]: the state_dict is damaged or too new"
            )
        *identity, frozen = state.tolist()
        if identity != self._identity() or frozen not in (0, 1):
            raise ValueError(
                f"the state_dict holds an LHCConv2d with (version, in_block, out_block, rigid) ="
                f" {tuple(identity)}, this layer has {tuple(self._identity())}: use the same LHCConfig"
            )
        self._set_frozen(bool(frozen))

    def extra_repr(self) -> str:
        """Return nn.Conv2d's line with the blocks and shapes."""
        config = self.config
        frozen = ", frozen" if self._frozen else ""
        return (
            f"{super().extra_repr()}, in_block={config.in_block}, out_block={config.out_block},"
            f" shapes={config.shapes!r}{frozen}"
        )


def attributes_of_others(conv: nn.Module) -> set[str]:
    """Return the names of the attributes of a convolution that somebody else put on it."""
    return added_attributes(conv, _OWN if isinstance(conv, LHCConv2d) else ())


def convolves_plainly(module: nn.Module) -> bool:
    """Return whether a module computes just what nn.Conv2d or LHCConv2d computes with its weight and bias.

    So do subclasses that leave the computation alone, parametrised layers among them: their weight is read
    as an attribute.
    """
    if not isinstance(module, nn.Conv2d) or own_forward(module):
        return False
    base = LHCConv2d if isinstance(module, LHCConv2d) else nn.Conv2d
    names = ("__call__", "forward", "_conv_forward", "masked_weight", "mask", "block_mask")
    return all(getattr(type(module), name, None) is getattr(base, name, None) for name in names)
