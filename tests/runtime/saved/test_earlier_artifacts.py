"""Artefacts that earlier states of the package wrote, kept as files.

``format_2`` holds the network below, accelerated for backend "native" on the CPU; ``format_1`` the same for
"torch", in a format that is not read any more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import norm_error
from torch import nn

import lhc_triton as lhc
from lhc_triton.artifact import ArtifactError

FILES = Path(__file__).with_name("files")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    with torch.no_grad():
        model[3].weight[:16, :, 1] = 0
        model[6].weight[:, :16] = 0
    return model.eval()


def test_a_file_of_this_format_still_gives_the_model_s_output():
    fast = lhc.load(FILES / "format_2.safetensors")
    x = torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert norm_error(fast(x), network()(x)) < 1e-5
    assert [row["backend"] for row in fast.report()["layers"]] == ["dense", "native", "native"]


@pytest.mark.parametrize("options", [{}, {"verify": False}], ids=["as it comes", "unverified"])
def test_a_file_of_an_earlier_format_is_refused_in_one_line(options):
    with pytest.raises(ArtifactError, match=r"format_1.safetensors: .*save (it|the network) again") as caught:
        lhc.load(FILES / "format_1.safetensors", **options)
    assert "\n" not in str(caught.value)
