"""Small random networks as other people write them: every one is drawn from a seed."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import random_steps  # noqa: F401  (enters its kinds of steps)
import random_writing_steps  # noqa: F401  (enters its kinds of steps)
import torch
import torch.nn.functional as F
from random_parts import STEPS, Recipe, Step
from torch import Tensor, nn

import lhc_triton as lhc

BACKENDS = ("auto", "native", "torch")

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    """A structured output that no library knows."""

    first: Any
    rest: list[Any] = field(default_factory=list)


class Answer(OrderedDict[str, Any]):
    """A dict with attributes, as libraries of transformers return it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


Output = Callable[[Any, list[Tensor], Tensor], Any]


def _written(m: Any, values: list[Tensor], image: Tensor) -> Tensor:
    out = torch.empty_like(values[-1])
    out.copy_(values[-1])
    return out


def _constant_written(m: Any, values: list[Tensor], image: Tensor) -> Tensor:
    out = torch.zeros(m.channels)
    out += values[-1].mean((0, 2, 3))
    return out


OUTPUTS: dict[str, Output] = {
    "map": lambda m, values, image: values[-1],
    "classes": lambda m, values, image: m.fc(values[-1].mean((2, 3))),
    "classes by view": lambda m, values, image: m.fc4(_quarters(values[-1]).view(len(image), -1)),
    "classes by flatten": lambda m, values, image: m.fc4(torch.flatten(_quarters(values[-1]), 1)),
    "classes by reshape": lambda m, values, image: m.fc4(_quarters(values[-1]).reshape(-1, 4 * m.channels)),
    "flat": lambda m, values, image: values[-1].view(values[-1].size(0), -1),
    "labels": lambda m, values, image: values[-1].argmax(1),
    "best": lambda m, values, image: values[-1].mean((2, 3)).topk(3),
    "mask": lambda m, values, image: values[-1] > 0.1,
    "bytes": lambda m, values, image: (values[-1].sigmoid() * 255).to(torch.uint8),
    "complex": lambda m, values, image: torch.fft.rfft2(values[-1].float()),
    "boxes": lambda m, values, image: (values[-1][:, :4] + 1) * 640,
    "scores": lambda m, values, image: values[-1][:, :1].sigmoid() * 0.01,
    "early map": lambda m, values, image: values[0],
    "slice": lambda m, values, image: values[-1][:, ::2, 1:],
    "turned": lambda m, values, image: values[-1].permute(0, 2, 3, 1),
    "spread": lambda m, values, image: values[-1].mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "sum": lambda m, values, image: values[-1].sum(),
    "number": lambda m, values, image: float(values[-1].mean()),
    "size": lambda m, values, image: values[-1].shape,
    "text": lambda m, values, image: "features",
    "nothing": lambda m, values, image: None,
    "image": lambda m, values, image: image,
    "buffer": lambda m, values, image: m.anchors,
    "made": lambda m, values, image: torch.arange(m.channels, dtype=torch.float32) * 2,
    "written": _written,
    "constant written": _constant_written,
    "half": lambda m, values, image: values[-1].half(),
    "normalised": lambda m, values, image: F.normalize(values[-1], dim=1),
}
PLAIN = ("map", "map", "classes", "classes by view", "classes by flatten", "flat")


def _quarters(value: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(value, 2)


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda items: {f"out{i}": item for i, item in enumerate(items)},
    "ordered": lambda items: OrderedDict((f"out{i}", item) for i, item in enumerate(items)),
    "answer": lambda items: Answer((f"out{i}", item) for i, item in enumerate(items)),
    "pair": lambda items: Pair(items[0], items[1:]),
    "dataclass": lambda items: Result(items[0], items[1:]),
    "nested": lambda items: {"all": (items, {"first": items[0]})},
    "integer keys": lambda items: dict(enumerate(items)),
}


class Section(nn.Module):
    """A convolution that changes the channels, and steps on the maps made since."""

    def __init__(self, recipe: Recipe, inputs: int, channels: int, steps: list[str], reduce: str) -> None:
        super().__init__()
        self.reduce = reduce
        options = {"stride": 2, "kernel": 3} if reduce == "stride" else {}
        self.enter = recipe.conv(inputs, channels, **options)
        self.norm = recipe.norm(channels)
        self.steps = nn.ModuleList()
        for made, name in enumerate(steps, start=1):
            first = made - 1 if recipe.rng.random() < 0.7 else recipe.rng.randrange(made)
            self.steps.append(Step(name, recipe, channels, (first, recipe.rng.randrange(made))))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return all maps of the section."""
        y = self.norm(self.enter(x)).relu()
        values = [F.max_pool2d(y, 2) if self.reduce == "pool" else y]
        for step in self.steps:
            values.append(step(values))
        return values


class Network(nn.Module):
    """A random network of one image input; what ``forward`` looks like is the subclasses' matter."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        recipe = Recipe(rng)
        names = list(STEPS)
        self.sections = nn.ModuleList()
        inputs = self.inputs = rng.choice([3, 3, 3, 1, 4])
        for _ in range(rng.choice([1, 1, 2])):
            channels = rng.choice([32, 32, 48, 64, 24, 40])
            steps = [rng.choice(names) for _ in range(rng.choice([1, 2, 2, 3]))]
            reduce = rng.choice(["", "", "pool", "stride"])
            self.sections.append(Section(recipe, inputs, channels, steps, reduce))
            inputs = channels
        self.channels = inputs
        self.fc = nn.Linear(inputs, 10)
        self.fc4 = nn.Linear(4 * inputs, 10)
        self.embed = nn.Embedding(16, inputs)
        self.register_buffer("anchors", torch.rand(5, 4))
        self.prepare = rng.choice(["", "", "", "scale", "in place", "checked", "keeps"])
        if rng.random() < 0.35:
            self.outputs = [rng.choice(PLAIN)]
            self.container = ""
        else:
            self.outputs = [rng.choice(list(OUTPUTS)) for _ in range(rng.choice([1, 2, 3]))]
            self.container = rng.choice(list(CONTAINERS) if len(self.outputs) > 1 else ["", "", *CONTAINERS])

    @property
    def drawn(self) -> list[Step]:
        """All steps."""
        return [step for section in self.sections for step in section.steps]

    @property
    def random(self) -> bool:
        """Whether two runs differ."""
        return any(step.random for step in self.drawn)

    @property
    def description(self) -> str:
        """What was drawn, in one line."""
        steps = [f"{step.name}/{step.variant % 840}{list(step.sources)}" for step in self.drawn]
        sections = [f"{s.enter.out_channels}{s.reduce and ' ' + s.reduce}" for s in self.sections]
        return (
            f"{type(self).__name__}({self.inputs}->{', '.join(sections)}; {self.prepare or 'raw'}; "
            f"{', '.join(steps)}; {self.container or 'bare'}: {', '.join(self.outputs)})"
        )

    def compute(self, image: Any, index: Tensor | None = None, gain: Any = None) -> Any:
        """Run the network; the maps are scaled by ``gain`` and shifted by the embedding of ``index``."""
        if self.prepare == "scale":
            image = (image - 0.5) / 0.25
        elif self.prepare == "in place":
            image -= 0.5
        elif self.prepare == "checked" and torch.is_tensor(image):
            image = image * 2
        elif self.prepare == "keeps":
            self.seen = image
        values: list[Tensor] = []
        h = image
        for section in self.sections:
            values += section(h)
            h = values[-1]
        if index is not None:
            values.append(h + self.embed(index)[:, :, None, None])
        if gain is not None:
            values.append(values[-1] * gain)
        found = [OUTPUTS[name](self, values, image) for name in self.outputs]
        return CONTAINERS[self.container](found) if self.container else found[0]


class Plain(Network):
    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


class Optional(Network):
    def forward(
        self, x: Tensor, gain: float | Tensor = 0.5, raw: bool = False, index: Tensor | None = None
    ) -> Any:
        return self.compute(x, index, None if raw else gain)


class KeywordOnly(Network):
    def forward(self, x: Tensor, *, gain: float | None = None) -> Any:
        return self.compute(x, gain=gain)


class Anything(Network):
    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.compute(*inputs, **options)


class Indexed(Network):
    def forward(self, image: Tensor, index: Tensor) -> Any:
        return self.compute(image, index)


class TwoImages(Network):
    def forward(self, left: Tensor, right: Tensor) -> Any:
        return self.compute(left * 0.5 + right)


class TrainsNothing(Network):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


FORMS: tuple[type[Network], ...] = (
    Plain,
    Plain,
    Plain,
    Optional,
    KeywordOnly,
    Anything,
    Indexed,
    TwoImages,
    TrainsNothing,
)


def draw_network(seed: int, observed: dict[str, Tensor] | None = None) -> Network:
    """Return the network of a seed: the same one, with the same weights, at every call.

    Some have hooks that write what their modules compute to ``observed``, for a caller who wants to see more
    than the output.
    """
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = rng.choice(FORMS)(rng)
        if rng.random() < 0.1:
            with warnings.catch_warnings(), contextlib.suppress(ValueError):  # nothing there to convert
                warnings.simplefilter("ignore")  # nobody trained it: its density is that of the start
                lhc.convert(network, lhc.LHCConfig(density=0.3, in_block=16, out_block=16))
                lhc.freeze(network)
        if rng.random() < 0.1:
            network.to(memory_format=torch.channels_last)
        if rng.random() < 0.2:
            network.to(rng.choice([torch.float64, torch.bfloat16, torch.float16]))
        network.train(rng.random() < 0.1)
        if rng.random() < 0.05:
            network.register_forward_pre_hook(_brighten)
        if rng.random() < 0.2:
            _observe(network, rng, {} if observed is None else observed)
        return network


def _observe(network: Network, rng: random.Random, observed: dict[str, Tensor]) -> None:
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | Step)]
    for name in rng.sample(names, 2):

        def keep(module: nn.Module, arguments: Any, output: Tensor, name: str = name) -> None:
            observed[name] = output
            observed[f"{name} at once"] = output.detach().clone()

        network.get_submodule(name).register_forward_hook(keep)


def _brighten(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return (arguments[0] + 0.25, *arguments[1:])


@dataclass(frozen=True)
class Call:
    """One call of a network; ``beyond`` the example if it has other arguments, which may be refused."""

    arguments: tuple[Tensor, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    what: str = "example"
    beyond: bool = False

    def copied(self) -> Call:
        """Return the call with tensors of its own, of the same strides."""
        return Call(tuple(_copied(x) for x in self.arguments), dict(self.keywords), self.what, self.beyond)


def _copied(x: Tensor) -> Tensor:
    """Return a copy with the same strides, of memory of its own."""
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    memory = x.as_strided((reach,), (1,), x.storage_offset()).clone()
    return memory.as_strided(x.shape, x.stride())


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _sliced(x: Tensor) -> Tensor:
    return torch.cat([x, x], 3)[..., ::2]


def _repeated(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": _channels_last,
    "turned": _turned,
    "sliced": _sliced,
    "repeated": _repeated,
}


@dataclass(frozen=True)
class Case:
    """What one seed stands for.

    Attributes:
        backend: to accelerate with.
        example: what the network is accelerated for.
        calls: the example and others of its kind, other batch and image sizes, layouts and arguments.
        overwrite: whether the caller writes into the outputs that it gets.
        before: how often the model was called before it is accelerated.
    """

    seed: int
    backend: str
    example: Call
    calls: tuple[Call, ...]
    overwrite: bool
    before: int


def draw_case(seed: int, network: Network) -> Case:
    """Return the calls to try on the network of a seed."""
    rng = random.Random(f"calls of {seed}")
    generator = torch.Generator().manual_seed(seed)
    dtype = network.fc.weight.dtype
    layout = rng.choice(["", "", "", "", "", *LAYOUTS])

    def call(what: str, batch: int, height: int, width: int, layout: str = layout, **keywords: Any) -> Call:
        def image() -> Tensor:
            made = torch.rand(batch, network.inputs, height, width, generator=generator, dtype=dtype)
            made *= rng.choice([1, 1, 0.3, 2])
            return LAYOUTS[layout](made) if layout else made

        arguments = [image()]
        if isinstance(network, TwoImages):
            arguments.append(image())
        if isinstance(network, Indexed):
            arguments.append(torch.randint(0, 16, (batch,), generator=generator))
        return Call(tuple(arguments), keywords, what, bool(keywords))

    batch, height, width = rng.choice([1, 2, 2, 3]), rng.choice([4, 6, 8, 12, 16]), rng.choice([5, 8, 12, 13])
    example = call("example", batch, height, width)
    other = rng.choice(list(LAYOUTS))
    calls = [
        example,
        call("other values", batch, height, width),
        call("other values again", batch, height, width),
        example,
        call("other batch", batch + 1, height, width),
        call("other size", batch, height + 4, width + 3),
        call("smaller size", batch, height // 2 + 1, width // 2),
        call("much larger size", 1, 3 * height + 1, 2 * width),
        call("other values at last", batch, height, width),
        call(f"{other} input", batch, height, width, other),
    ]
    calls.append(call("no image", 0, height, width))
    if isinstance(network, Optional):
        gain = torch.rand(1, generator=generator, dtype=dtype)
        calls.append(Call((*call("", batch, height, width).arguments, gain), {}, "one more argument", True))
    if isinstance(network, Optional | KeywordOnly | Anything):
        calls.append(call("keyword", batch, height, width, gain=1.5))
        calls.append(call("other keyword", batch, height, width, gain=-0.5))
    if rng.random() < 0.5:  # the example need not be the first call
        calls = [*calls[4:6], *calls[1:4], *calls[6:]]
    backend = rng.choice(BACKENDS)
    if dtype == torch.float64 and backend == "native":
        backend = "torch"
    return Case(seed, backend, example, tuple(calls), rng.random() < 0.3, rng.choice([0, 0, 0, 1, 2]))
