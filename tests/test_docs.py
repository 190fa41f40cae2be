"""What README and docs show runs: Python blocks as they stand, command lines as far as their options go."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from lhc_triton.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = [(page, index) for page in PAGES for index in range(len(blocks(page, "python")))]
COMMANDS = [
    line
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip().startswith("lhc-triton")
]


@pytest.mark.parametrize(("page", "index"), PYTHON, ids=lambda v: v.name if isinstance(v, Path) else str(v))
def test_a_python_block_runs_as_it_stands(page, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(page, "python")[index], f"{page.name} block {index}", "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_has_the_options_that_are_shown(line):
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("lhc-triton", list(words), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, list(words))
    assert command is not None
    command.make_context(name, rest, parent=context)


def test_the_pages_have_something_to_try():
    assert PYTHON
    assert len(COMMANDS) > 10


def anchors(page):
    """The names under which GitHub and package indexes link to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            file, _, heading = target.partition("#")
            place = page.parent / file if file else page
            assert place.exists(), target
            assert not heading or heading in anchors(place), target
