"""Models of torchvision and timm by their names, in stand-ins for the two: they need not be installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lhc_triton.sources import open_network

TORCHVISION = """
from torch import nn
def small(*, weights=None, **more):
    assert weights is None
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
def segmenting(*, weights=None, weights_backbone="to be downloaded", **more):
    assert weights is None and weights_backbone is None
    return small()
def failing(**more):
    raise RuntimeError("no such\\noperator")
KNOWN = {"small": small, "segmenting": segmenting, "failing": failing}
def list_models(): return list(KNOWN)
def get_model_builder(name): return KNOWN[name]
def get_model(name, **options): return KNOWN[name](**options)
"""
TIMM = """
from torch import nn
def is_model(name): return name.split(".")[0] in ("small", "only-here")
def create_model(name, pretrained):
    assert not pretrained
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
"""
BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call it with the text of the two packages; None for one that is not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lhc_triton.sources.opening.find_spec", lambda name: (tmp_path / name).exists() or None
    )
    monkeypatch.syspath_prepend(tmp_path)

    def put(torchvision: str | None, timm: str | None) -> None:
        for name, text in (("torchvision", torchvision), ("timm", timm)):
            for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
                monkeypatch.delitem(sys.modules, loaded)
            if text is not None:
                (tmp_path / name).mkdir()
                (tmp_path / name / "__init__.py").write_text("" if name == "torchvision" else text)
        if torchvision is not None:
            (tmp_path / "torchvision" / "models.py").write_text(torchvision)

    yield put
    for loaded in [module for module in sys.modules if module.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("source", "filters"),
    [
        *(("small", 16), ("torchvision/small", 16), ("timm/small", 32), ("only-here", 32)),
        *(("small.tag_in1k", 32), ("segmenting", 16)),
    ],
)
def test_a_model_goes_by_its_name(install, source, filters):
    install(TORCHVISION, TIMM)
    found = open_network(source, input_shape="1x3x8x8")
    assert found.random
    assert found.model[0].out_channels == filters


@pytest.mark.parametrize(
    ("source", "libraries", "said"),
    [
        ("failing", (TORCHVISION, TIMM), "torchvision cannot make 'failing': RuntimeError: no such operator"),
        ("timm/other", (TORCHVISION, TIMM), "timm/other: timm has no model 'other'"),
        ("torchvision/only-here", (TORCHVISION, TIMM), "torchvision has no model 'only-here'"),
        ("timm/small", (TORCHVISION, None), "timm/small: timm is not installed"),
        ("other", (TORCHVISION, TIMM), "no network 'other' is known; give package.module:factory"),
        ("other", (None, None), "no network 'other' is known; give package.module:factory"),
        (
            "other",
            (BROKEN, None),
            r"no network 'other' is known, and torchvision does not import here .*::nms",
        ),
        ("torchvision/small", (BROKEN, TIMM), r"torchvision/small: torchvision does not import here .*::nms"),
        ("other.safetensors", (BROKEN, TIMM), "other.safetensors: there is no such file"),
    ],
)
def test_a_name_that_gives_no_model_is_one_clear_line(install, source, libraries, said):
    install(*libraries)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        open_network(source, input_shape="1x3x8x8")
    assert "\n" not in str(caught.value)


def test_one_library_that_does_not_import_does_not_hide_the_other(install):
    install(BROKEN, TIMM)
    assert open_network("small", input_shape="1x3x8x8").model[0].out_channels == 32
