"""Imports point one way: learn -> plan -> pack -> run, with bench and the command line outside."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"lhc_triton": ROOT, "lhc_kernels": ROOT / "kernels", "lhc_bench": ROOT / "bench"}
OURS = tuple(SOURCES)

# For every part, the parts it may import beside itself. The longest matching prefix rules.
LEARN = {
    f"lhc_triton.{name}"
    for name in ("topology", "masking", "takeover", "layers", "conversion", "handcrafted", "schedule")
}
ANYWHERE = {
    f"lhc_triton.{name}"
    for name in ("files", "errors", "tables", "tf32", "interrupts", "finite", "watching", "generators")
}
BELOW = ANYWHERE | {"lhc_triton.topology", "lhc_triton.takeover"}
ROOM = "lhc_triton.runtime"
# The list of operations is below what is recorded by it, and saved.
ARGUMENTS, OPERATIONS = f"{ROOM}.saved.arguments", f"{ROOM}.saved.operations"
OP = LEARN | ANYWHERE | {"lhc_triton.planning", "lhc_kernels"}
REPLAY = OP | {f"{ROOM}.op", ARGUMENTS, OPERATIONS}
CHOOSING = REPLAY | {f"{ROOM}.replay"}
NETWORK = CHOOSING | {f"{ROOM}.choosing", "lhc_triton.channels", "lhc_triton.shrinking"}
SAVED = NETWORK | {f"{ROOM}.network"}
RUN = SAVED | {f"{ROOM}.saved"}
SOURCES_OF = {"lhc_triton.artifact", "lhc_triton.models"}
PRODUCT = RUN | SOURCES_OF | {"lhc_triton", "lhc_triton.training", "lhc_triton.sources"}
MEASURE = PRODUCT | {"lhc_bench.files"}
ALLOWED: dict[str, set[str]] = {
    "lhc_triton.files": set(),
    "lhc_triton.errors": set(),
    "lhc_triton.tables": set(),
    "lhc_triton.tf32": set(),
    "lhc_triton.finite": set(),
    "lhc_triton.watching": set(),
    "lhc_triton.generators": set(),
    "lhc_triton.interrupts": set(),
    "lhc_triton.topology": ANYWHERE,
    "lhc_triton.takeover": ANYWHERE,
    "lhc_triton.masking": {"lhc_triton.topology"},
    "lhc_triton.layers": BELOW | {"lhc_triton.masking"},
    "lhc_triton.conversion": BELOW | {"lhc_triton.layers"},
    "lhc_triton.handcrafted": BELOW | {"lhc_triton.layers", "lhc_triton.conversion"},
    "lhc_triton.schedule": BELOW | {"lhc_triton.layers", "lhc_triton.conversion"},
    "lhc_triton.selection": LEARN | ANYWHERE | {"lhc_triton.planning"},
    "lhc_triton.pruning": LEARN | ANYWHERE | {"lhc_triton.planning", "lhc_triton.selection"},
    "lhc_triton.clustering": set(),
    "lhc_triton.reordering": {"lhc_triton.channels", "lhc_triton.clustering"},
    "lhc_triton.consolidation": LEARN
    | ANYWHERE
    | {f"lhc_triton.{name}" for name in ("planning", "channels", "clustering", "reordering")},
    "lhc_triton.channels": LEARN | ANYWHERE,
    "lhc_triton.shrinking": LEARN | ANYWHERE | {"lhc_triton.channels"},
    "lhc_triton.models": LEARN | ANYWHERE,
    "lhc_triton.training": LEARN
    | ANYWHERE
    | {f"lhc_triton.{name}" for name in ("consolidation", "models", "planning", "pruning", "selection")},
    "lhc_triton.planning": LEARN | ANYWHERE,
    ROOM: set(),
    f"{ROOM}.op": OP,
    ARGUMENTS: set(),
    OPERATIONS: OP | {f"{ROOM}.op", ARGUMENTS},
    f"{ROOM}.replay": REPLAY,
    f"{ROOM}.choosing": CHOOSING,
    f"{ROOM}.network": NETWORK,
    f"{ROOM}.saved": SAVED,
    "lhc_triton.artifact": RUN,
    "lhc_triton.predicting": {"lhc_triton.training"},
    "lhc_triton.sources": RUN | SOURCES_OF,
    "lhc_triton.__main__": {"lhc_triton.cli"},
    "lhc_triton": RUN
    | {"lhc_triton.artifact", "lhc_triton.interrupts", "lhc_triton.pruning", "lhc_triton.consolidation"},
    "lhc_kernels": set(),
    "lhc_bench.measure": MEASURE,
    "lhc_bench.pictures": MEASURE | {"lhc_bench.measure"},
    "lhc_bench.reports": MEASURE | {"lhc_bench.measure", "lhc_bench.pictures"},
    "lhc_bench.files": ANYWHERE,
}
ALLOWED |= {"lhc_triton.cli": set(ALLOWED), "lhc_bench": {"lhc_triton"}}
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


def holds(part: str, target: str) -> bool:
    """Whether a part is or contains another; the whole package counts as its own top level only."""
    return target == part or (part not in OURS and target.startswith(part + "."))


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle."""
    found, at, stack, low = [], {}, [], {}

    def visit(module: str) -> None:
        at[module] = low[module] = len(at)
        stack.append(module)
        for other in graph[module]:
            if other not in at:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == at[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in at:
            visit(module)
    return found


def import_graph() -> dict[str, set[str]]:
    """For each of our modules those it imports: at any depth, for types only, too."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = imports_of(module, path) - {"lhc_triton.__version__"}
        homes = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module] = (homes & set(known)) - {module}
    return graph


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
            if target != part and not any(holds(a, target) for a in ALLOWED[part]):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_see_a_wrong_import(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from ..runtime.op.packing import pack\n")
    assert imports_of("lhc_triton.planning.bad", path) == {"lhc_triton.runtime.op.packing.pack"}
    assert part_of("lhc_triton.runtime.op.packing.pack") not in ALLOWED["lhc_triton.planning"]


def test_no_files_import_each_other_in_a_circle():
    assert circles(import_graph()) == []


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(graph) == [["b", "c"], ["e", "f"]]


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("lhc_kernels")])
def test_kernels_import_torch_and_triton_only(module):
    outside = {name.split(".")[0] for name in imports_of(module, modules()[module])}
    assert outside - set(sys.stdlib_module_names) <= KERNEL_LIBRARIES | {"lhc_kernels"}


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("lhc_triton.planning")])
def test_planning_needs_torch_for_reading_networks_only(module):
    if module not in ("lhc_triton.planning.extract", "lhc_triton.planning.remainder"):
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


def test_planning_and_accelerating_load_no_compiler():
    code = (
        "import sys, torch, lhc_triton as lhc\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))\n"
        "x = torch.rand(1, 3, 8, 8)\n"
        "lhc.plan(model, x)\n"
        "lhc.accelerate(model, x, tune='off')(x)\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
