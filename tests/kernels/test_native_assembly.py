"""What compilers make of the native kernel: no warnings, and inner loops whose sums stay in registers."""

import platform
import re
import shutil
import subprocess

import pytest

from lhc_kernels.cpu import building
from lhc_kernels.cpu.building import BuildError, find_compiler

# Those that include nothing of torch's.
PLAIN = sorted(
    path for path in building.SOURCES.glob("*.cpp") if not re.search('<ATen/|"operands.h"', path.read_text())
)


@pytest.fixture(scope="module")
def compiler():
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def on_x86():
    if platform.machine() != "x86_64":
        pytest.skip("the instructions are those of x86")


@pytest.mark.parametrize("cpu", ["x86-64-v4 -mavx512bf16", "x86-64-v3", "x86-64"])
def test_the_sources_compile_without_a_warning(compiler, cpu, tmp_path):
    on_x86()
    # Those that include torch's headers take ten times as long, and do not depend on the processor.
    sources = sorted(building.SOURCES.glob("*.cpp")) if "v4" in cpu else PLAIN
    for source in sources:
        flags = [
            *building.FLAGS,
            *building.torch_flags(),
            "-Wall",
            "-Wextra",
            "-Werror",
            *f"-march={cpu}".split(),
        ]
        subprocess.run([*compiler, *flags, "-c", source, "-o", tmp_path / "out.o"], check=True)


@pytest.mark.parametrize(
    ("source", "cpu", "kernels"),
    [
        ("cells_float.cpp", "x86-64-v3", 3),
        ("cells_float.cpp", "x86-64-v4", 10),
        ("cells_pairs.cpp", "x86-64-v4 -mavx512bf16", 8),
    ],
)
def test_sums_stay_in_registers(compiler, source, cpu, kernels, tmp_path):
    # A sum that is stored in every round makes a kernel two to three times as slow.
    on_x86()
    assembly = tmp_path / "cells.s"
    flags = [*building.FLAGS, *f"-march={cpu}".split()]
    subprocess.run([*compiler, *flags, "-S", building.SOURCES / source, "-o", assembly], check=True)
    loops = 0
    labels = re.split(r"^(\.L\w+):$", assembly.read_text(), flags=re.MULTILINE)
    for label, block in zip(labels[1::2], labels[2::2], strict=True):
        products = re.findall(r"\t(?:vfn?m\w+ps|vdpbf16ps)\t.*", block)
        if len(products) < 12 or not re.search(rf"\tj\w+\t{re.escape(label)}\b", block):
            continue
        loops += 1
        moves = re.findall(r"\tvmov\w+\t(.*)", block)
        assert not [move for move in moves if re.match(r"%[xyz]mm\d+, .*\(|.*\(%r[sb]p\)", move)]
    assert loops >= kernels


def test_the_kernel_compiles_for_neon(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no cross compiler for aarch64")
    for source in PLAIN:
        command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-c", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "out.o")], check=True)
