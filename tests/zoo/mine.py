"""A user's own package: factories as a command line names them, good and bad."""

import torch
from torch import nn


class Mine(nn.Module):
    """A small residual network for 3x24x24 images."""

    def __init__(self, width: int = 32, classes: int = 5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.tail = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.body(x) + self.shortcut(x)).relu()
        return self.head(self.tail(x).relu().mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Mine()


def grey():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1)
            self.more = nn.Conv2d(16, 16, 3, padding=1)
            self.side = nn.Linear(4, 16)

        def forward(self, x, y):
            return self.more(self.conv(x).relu()) + self.side(y)[:, :, None, None]

    torch.manual_seed(0)
    return Two()


def raises():
    raise RuntimeError("no such checkpoint\nanywhere")


def needs(width):
    return Mine(width)


def gives_text():
    return "a network"


NUMBER = 3


def stripes():
    """A network for the ten classes of 1x28x28 images, without a seed of its own: the run's counts."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.1),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def leaves() -> nn.Module:
    raise SystemExit(3)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Mine()
