"""Round trips of the zoo: stored whole, read in another process without the class, copied, exported."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils._pytree import tree_flatten
from zoo.networks import ZOO, build

import lhc_triton as lhc


def leaves(value):
    return tree_flatten(value)


def assert_same(found, expected, **tolerance):
    (mine, shape), (theirs, other) = leaves(found), leaves(expected)
    assert shape == other
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every network accelerated and saved, with an input and the output of the accelerated network."""
    folder = tmp_path_factory.mktemp("zoo")
    networks = {}
    for index, name in enumerate(ZOO):
        model, inputs = build(name)
        fast = lhc.accelerate(model, inputs, tune="off")
        path = folder / f"{index}.safetensors"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lhc.save(fast, path)
        output = fast(*inputs)
        torch.save((inputs, output), folder / f"{index}.pt")
        networks[name] = (model, inputs, fast, path, [str(warning.message) for warning in said])
    return networks


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_is_stored_whole_and_computes_what_the_model_does(stored, name):
    model, inputs, fast, path, said = stored[name]
    assert said == []
    assert fast.record.traced, fast.explain()
    assert_same(fast(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    loaded = lhc.load(path)
    assert_same(loaded(*inputs), fast(*inputs), rtol=0, atol=0)
    for _ in range(3):  # recorded, then replayed
        assert_same(loaded(*inputs), fast(*inputs), rtol=0, atol=0)


def test_every_file_is_read_in_a_process_that_does_not_know_the_classes(stored):
    folder = next(iter(stored.values()))[3].parent
    code = (
        "import sys, torch, lhc_triton as lhc\n"
        "from torch.utils._pytree import tree_flatten\n"
        "for index in range(int(sys.argv[1])):\n"
        "    inputs, expected = torch.load(f'{index}.pt', weights_only=True)\n"
        "    found = lhc.load(f'{index}.safetensors')(*inputs)\n"
        "    (mine, shape), (theirs, other) = tree_flatten(found), tree_flatten(expected)\n"
        "    assert shape == other, index\n"
        "    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), index\n"
        "assert not any(name.startswith('zoo') for name in sys.modules)\n"
    )
    path = os.pathsep.join(p for p in sys.path if not p.endswith("tests"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code, str(len(stored))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ZOO)
def test_copies_compute_the_same(stored, name):
    _, inputs, fast, _, _ = stored[name]
    assert_same(copy.deepcopy(fast)(*inputs), fast(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ZOO)
def test_what_is_exported_computes_the_same(stored, name):
    _, inputs, fast, _, _ = stored[name]
    exported = torch.export.export(fast, inputs).module()
    assert_same(exported(*inputs), fast(*inputs), rtol=1e-5, atol=1e-6)


def test_a_network_that_no_file_holds_whole_names_the_call(tmp_path):
    class Sorted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("tanh")[0]

        def forward(self, x):
            return self.net(x).cumsum(1)

    fast = lhc.accelerate(Sorted().eval(), build("tanh")[1], tune="off")
    with pytest.warns(UserWarning, match=r"operation 'cumsum' \(node 'cumsum'\) is not on the list"):
        lhc.save(fast, tmp_path / "x.safetensors")
