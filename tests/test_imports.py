"""Imports point one way: learn -> plan -> pack -> run, with bench and the command line outside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"lhc_triton": ROOT, "lhc_kernels": ROOT / "kernels", "lhc_bench": ROOT / "bench"}
OURS = tuple(SOURCES)

# For every part, the parts it may import beside itself. The longest matching prefix rules.
LEARN = {
    f"lhc_triton.{name}"
    for name in ("topology", "takeover", "layers", "conversion", "handcrafted", "schedule")
}
FILES = "lhc_triton.files"
RUN = LEARN | {FILES, "lhc_triton.planning", "lhc_triton.runtime", "lhc_kernels"}
ALLOWED: dict[str, set[str]] = {
    FILES: set(),
    "lhc_triton.topology": set(),
    "lhc_triton.takeover": set(),
    "lhc_triton.layers": {"lhc_triton.topology", "lhc_triton.takeover"},
    "lhc_triton.conversion": {"lhc_triton.topology", "lhc_triton.takeover", "lhc_triton.layers"},
    "lhc_triton.handcrafted": {"lhc_triton.topology", "lhc_triton.layers", "lhc_triton.conversion"},
    "lhc_triton.schedule": {"lhc_triton.topology", "lhc_triton.layers", "lhc_triton.conversion"},
    "lhc_triton.selection": LEARN | {"lhc_triton.planning"},
    "lhc_triton.pruning": LEARN | {"lhc_triton.planning", "lhc_triton.selection"},
    "lhc_triton.models": LEARN | {FILES},
    "lhc_triton.training": LEARN
    | {FILES, "lhc_triton.models", "lhc_triton.planning", "lhc_triton.pruning", "lhc_triton.selection"},
    "lhc_triton.planning": LEARN,
    "lhc_triton.runtime": RUN,
    "lhc_triton.artifact": RUN,
    "lhc_triton": RUN | {"lhc_triton.artifact", "lhc_triton.pruning"},
    "lhc_kernels": set(),
    "lhc_triton.cli": set(OURS),
    "lhc_bench": set(OURS),
}
KERNEL_LIBRARIES = {"torch", "triton"}


def modules() -> dict[str, Path]:
    """Every module of the three packages, by dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    """The longest part in ALLOWED that holds the module."""
    return max((p for p in ALLOWED if module == p or module.startswith(p + ".")), key=len)


def for_types(node: ast.stmt) -> bool:
    """Whether a statement is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(module: str, path: Path, at_run_time: bool = False) -> set[str]:
    """Absolute names of all a file imports, at any depth; with or without its type-checking blocks."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    tree = ast.parse(path.read_text())
    if at_run_time:
        typing_only = [
            n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        ]
        tree.body = [node for node in tree.body if node not in typing_only]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def test_every_import_points_the_same_way():
    known = modules()
    wrong = []
    for module, path in known.items():
        part = part_of(module)
        for name in imports_of(module, path):
            if name.split(".")[0] not in OURS or name == "lhc_triton.__version__":
                continue
            target = part_of(name)
            allowed = any(target == a or target.startswith(a + ".") for a in ALLOWED[part])
            if target != part and not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_see_a_wrong_import(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from ..runtime.ops import grouped_conv2d\n")
    assert imports_of("lhc_triton.planning.bad", path) == {"lhc_triton.runtime.ops.grouped_conv2d"}
    assert part_of("lhc_triton.runtime.ops.grouped_conv2d") not in ALLOWED["lhc_triton.planning"]


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("lhc_kernels")])
def test_kernels_import_torch_and_triton_only(module):
    outside = {name.split(".")[0] for name in imports_of(module, modules()[module])}
    assert outside - set(sys.stdlib_module_names) <= KERNEL_LIBRARIES | {"lhc_kernels"}


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("lhc_triton.planning")])
def test_planning_needs_torch_for_extraction_only(module):
    if module != "lhc_triton.planning.extract":
        names = imports_of(module, modules()[module], at_run_time=True)
        assert not {name for name in names if name.split(".")[0] == "torch"}


def test_importing_the_package_loads_no_kernel_no_plotting_and_no_device():
    code = (
        "import sys, torch, lhc_triton\n"
        "heavy = {'triton', 'matplotlib', 'typer', 'rich', 'lhc_kernels', 'lhc_bench'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
