"""The rules of the house that a machine can check: sizes, openings, links."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_MODULE_LINES = 400
# Without its docstring: shapes, units and errors may take what room they need.
MAX_FUNCTION_LINES = 60
MAX_README_LINES = 180
# A row of a table cannot be wrapped.
MAX_PAGE_WIDTH = 100

PACKAGE = sorted((ROOT / "axolotl_psft").rglob("*.py"))
CODE = [
    *PACKAGE,
    *(
        path
        for folder in ("benchmarks", "docs", "examples", "previous_lane", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
# Results are written by a command, in rows as wide as they come.
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
GENERATED = {"compatibility.md", "evidence.md", "gpu.md", "map.md", "rules.md"}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_a_module_is_short(path: Path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_MODULE_LINES, "split it by what it is about"


@pytest.mark.parametrize("path", PACKAGE, ids=ids)
def test_functions_are_short(path: Path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        f"{each.name}: {num_lines(each)} lines"
        for each in functions
        if num_lines(each) > MAX_FUNCTION_LINES
    }
    assert not long, "give its pieces names"


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of the code, from `def` to its end."""
    first = function.body[0]
    docstring = 0
    if ast.get_docstring(function) is not None:
        docstring = first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_a_file_opens_with_what_lives_there(path: Path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_lines_of_a_page_fit_a_screen(path: Path):
    lines = path.read_text().splitlines()
    long = [i for i, line in enumerate(lines, 1) if len(line) > MAX_PAGE_WIDTH]
    assert path.name in GENERATED or not long


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_of_a_page_lead_somewhere(path: Path):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text())
    dead = [link for link in links if not leads_somewhere(path, link)]
    assert not dead


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a relative link has a file, and a heading where it asks for one."""
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    if not target.exists():
        return False
    headings = (
        re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
    )
    return not anchor or anchor in {anchor_of(heading) for heading in headings}


def anchor_of(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
