"""The zoo: a network for each construct that artefacts hold, small enough for tests.

Each entry of ZOO is (factory, shapes of its inputs). Factories draw their weights from a seed of their own.
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


def conv(i, o, k=3, **more):
    return nn.Conv2d(i, o, k, padding=more.pop("padding", k // 2), **more)


def simple(*tail, width=16, out=16):
    """Stem, one wide convolution, then whatever is to be tried."""
    return nn.Sequential(conv(3, width), nn.ReLU(), conv(width, out), *tail)


class Net(nn.Module):
    """Two convolutions and a function of the second one's output and the network."""

    def __init__(self, function, width=16, **parts):
        super().__init__()
        self.first = conv(3, width)
        self.second = conv(width, width)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.second(F.relu(self.first(x))))


def shuffled(m, x):
    n, c, h, w = x.shape
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w) + 1


def swapped(m, x):
    first, second = x.chunk(2, 1)
    return torch.cat([second, first], 1)


def stochastic_depth(input, p, mode, training=True):
    """As torchvision's, which a trace does not look into either."""
    if training:
        raise NotImplementedError("in eval mode only")
    return input


stochastic_depth.__module__ = "torchvision.ops.stochastic_depth"
torch.fx.wrap("stochastic_depth")


def checked(m, x):
    torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
    return x + stochastic_depth(x * 2, 0.1, "row", m.training)


def normed(m, x):
    """As timm's norms with an activation call it."""
    n = m.norm
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, m.training, 0.0, n.eps).relu()


class Dashed(nn.Module):
    """Names of modules that Python could not write, as in torchvision's RegNets."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("block1-0", simple(nn.Tanh()))
        self.block.add_module("block1-1", nn.Conv2d(16, 8, 1))

    def forward(self, x):
        return self.block(x)


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = conv(3, 16), conv(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join, self.head = conv(32, 16), conv(16, 2, 1)

    def forward(self, x):
        a = F.leaky_relu(self.down1(x), 0.1)
        b = F.elu(self.down2(F.max_pool2d(a, 2)))
        return {"mask": self.head(F.relu(self.join(torch.cat([a, self.up(b)], 1)))), "deep": b}


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom, self.middle, self.top = conv(3, 16), conv(16, 16, stride=2), conv(16, 16, stride=2)

    def forward(self, x):
        a = F.relu(self.bottom(x))
        b = F.relu(self.middle(a))
        c = self.top(b)
        b = b + F.interpolate(c, scale_factor=2, mode="nearest")
        return [a + F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False), b, c]


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 16)
        self.norm = nn.BatchNorm2d(16)
        self.reduce, self.expand = conv(16, 4, 1), conv(4, 16, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.a(x)))
        y = self.b(x)
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return x + y * gate


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 16), conv(19, 16), conv(35, 16)])
        self.norm = nn.BatchNorm2d(51)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.norm(x)


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32, 1),
            nn.Hardswish(),
            conv(32, 32, groups=32),
            nn.ReLU6(),
            conv(32, 16, 1),
            nn.BatchNorm2d(16),
            conv(16, 16),
        )

    def forward(self, x):
        return self.body(x)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = simple(nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16 * 16, 10), nn.LogSoftmax(1))

    def forward(self, x):
        return self.head(self.features(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.one, self.three, self.five = conv(16, 8, 1), conv(16, 8, 3), conv(16, 8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return torch.cat([self.one(x), self.three(x), self.five(x), F.avg_pool2d(x, 3, 1, 1)], 1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 16)
        self.style = nn.Linear(5, 16)

    def forward(self, x, style):
        return self.b(F.relu(self.a(x))) * self.style(style).unsqueeze(-1).unsqueeze(-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 16)
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.mix(self.norm(tokens))
        return tokens.transpose(1, 2).reshape(n, c, h, w)


IMAGE = ((2, 3, 8, 8),)
ZOO = {
    "leaky relu": (lambda: simple(nn.LeakyReLU(0.2), conv(16, 8)), IMAGE),
    "prelu": (lambda: simple(nn.PReLU(16, init=0.3), conv(16, 8)), IMAGE),
    "elu": (lambda: simple(nn.ELU(0.7), conv(16, 8)), IMAGE),
    "gelu": (lambda: simple(nn.GELU("tanh"), conv(16, 8), nn.GELU()), IMAGE),
    "tanh": (lambda: simple(nn.Tanh(), conv(16, 3), nn.Tanh()), IMAGE),
    "mish and softplus": (lambda: simple(nn.Mish(), conv(16, 8), nn.Softplus()), IMAGE),
    "upsample": (lambda: simple(nn.Upsample(scale_factor=2, mode="bilinear"), conv(16, 8)), IMAGE),
    "upsample to a size": (lambda: simple(nn.Upsample((12, 10)), conv(16, 8)), IMAGE),
    "transposed": (lambda: simple(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), conv(8, 8)), IMAGE),
    "pixel shuffle": (lambda: simple(nn.PixelShuffle(2), out=48), IMAGE),
    "pixel unshuffle": (lambda: simple(nn.PixelUnshuffle(2), conv(64, 8)), IMAGE),
    "group norm": (lambda: simple(nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 8)), IMAGE),
    "layer norm": (lambda: simple(nn.LayerNorm([16, 8, 8]), conv(16, 8)), IMAGE),
    "dropout": (lambda: simple(nn.Dropout2d(0.3), conv(16, 8), nn.Dropout(0.1)), IMAGE),
    "functional dropout": (lambda: Net(lambda m, x: F.dropout(x, 0.5, training=False) * 2), IMAGE),
    "channel shuffle": (lambda: Net(shuffled), IMAGE),
    "channel shuffle module": (lambda: simple(nn.ChannelShuffle(4), conv(16, 8)), IMAGE),
    "zero pad": (lambda: simple(nn.ZeroPad2d((1, 2, 0, 1)), conv(16, 8, padding=0)), IMAGE),
    "reflected": (lambda: Net(lambda m, x: F.pad(x, (1, 1, 2, 2), mode="reflect")), IMAGE),
    "padded with a value": (lambda: Net(lambda m, x: F.pad(x, (1, 0, 0, 1), value=0.5)), IMAGE),
    "padding mode": (lambda: simple(conv(16, 8, padding_mode="reflect")), IMAGE),
    "arithmetic": (lambda: Net(lambda m, x: (1 - x) / 2 + 3 * x - x / 4 + (-x) ** 2), IMAGE),
    "tuple": (lambda: Net(lambda m, x: (x, x.mean((2, 3)))), IMAGE),
    "nested": (lambda: Net(lambda m, x: {"a": [x, (x + 1,)], "b": x.abs().clamp(0, 1)}), IMAGE),
    "chunks": (lambda: Net(swapped), IMAGE),
    "unet": (Unet, IMAGE),
    "pyramid": (Pyramid, IMAGE),
    "squeeze and excite": (SqueezeExcite, IMAGE),
    "dense": (Dense, IMAGE),
    "inverted": (Inverted, IMAGE),
    "classifier": (Classifier, IMAGE),
    "branches": (Branches, IMAGE),
    "two inputs": (TwoInputs, (*IMAGE, (2, 5))),
    "attention": (Attention, IMAGE),
    "functional norm": (lambda: Net(normed, norm=nn.BatchNorm2d(16)), IMAGE),
    "checked": (lambda: Net(checked), IMAGE),
    "dashed": (Dashed, IMAGE),
}


def build(name):
    """Return a network with block zeros in its second convolution, in eval mode, and its inputs."""
    factory, shapes = ZOO[name]
    torch.manual_seed(len(name))
    model = factory().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    second = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1][1]
    with torch.no_grad():
        second.weight[:, second.in_channels // 2 :] = 0
    return model, tuple(torch.randn(shape) for shape in shapes)
