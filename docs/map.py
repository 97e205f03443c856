"""Draws the rooms of axolotl_psft from their imports: writes docs/map.md.

`python docs/map.py`. A room is a module or a folder of the package. Only the code is
read; nothing is imported, and no names are listed here, so a new room draws itself.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "axolotl_psft"
PAGE = ROOT / "docs" / "map.md"

_HEAD = """\
# The rooms

Written by `python docs/map.py` from the imports of the code. An arrow means: imports.
Where a room reaches another through a third, the direct arrow is left out; the table
has all of them.
"""

Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The package's modules by dotted name; of a folder, that of its `__init__`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT) -> Graph:
    """Which modules of the package each imports, at its top or inside a function."""
    files = modules(root)
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = imported_names(path, package)
        graph[name] = {_home(each, files) for each in named} - {name, ""}
    return graph


def imported_names(path: Path, package: str = "", *, at_top: bool = False) -> set[str]:
    """The dotted names that a file imports; ``at_top``: not those inside functions."""
    tree = ast.parse(path.read_text(), str(path))
    nodes = tree.body if at_top else ast.walk(tree)
    return {name for node in nodes for name in _named(node, package)}


def _named(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that an import statement, or `import_module`, asks for."""
    if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
        yield from (each.value for each in node.args if isinstance(each, ast.Constant))
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = node.module or ""
        if node.level:
            above = package.split(".")
            kept = above[: len(above) - node.level + 1]
            start = ".".join([*kept, *filter(None, [node.module])])
        yield from (f"{start}.{alias.name}" for alias in node.names)


def _home(name: str, files: dict[str, Path]) -> str:
    """The module of the package that a dotted name lies in; empty: another's."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    """`axolotl_psft.megatron.step` -> `megatron/`; the package itself: `__init__`."""
    _, _, rest = module.partition(".")
    first = rest.split(".")[0]
    is_folder = (ROOT / PACKAGE / first).is_dir()
    return (f"{first}/" if is_folder else first) if first else "__init__"


def rooms(graph: Graph) -> Graph:
    """The same between rooms, in the order of their names."""
    between: Graph = {room(module): set() for module in graph}
    for module, imported in graph.items():
        between[room(module)] |= {room(each) for each in imported} - {room(module)}
    return between


def without_detours(graph: Graph) -> Graph:
    """The graph without those arrows that another way leads along, too."""

    def reached(start: str, seen: set[str]) -> set[str]:
        for each in graph[start] - seen:
            seen.add(each)
            reached(each, seen)
        return seen

    return {
        name: {
            each
            for each in targets
            if not any(each in reached(other, set()) for other in targets - {each})
        }
        for name, targets in graph.items()
    }


def purpose(name: str) -> str:
    """The first sentence of a room's docstring."""
    files = modules()
    module = PACKAGE if name == "__init__" else f"{PACKAGE}.{name.rstrip('/')}"
    text = ast.get_docstring(ast.parse(files[module].read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def render() -> str:
    """The page: a picture of the rooms, and a table."""
    graph = rooms(imports())
    # What imports all the others by name says nothing in a picture.
    drawn = {name: graph[name] for name in graph if name != "__init__"}
    lines = [_HEAD, "```mermaid", "flowchart TD"]
    lines += [f"  {_id(name)}[{name}]" for name in drawn]
    for name, targets in without_detours(drawn).items():
        lines += [f"  {_id(name)} --> {_id(each)}" for each in sorted(targets)]
    lines += ["```", "", "| room | what lives there | imports |", "|---|---|---|"]
    for name, targets in graph.items():
        path = f"../{PACKAGE}/{name}" + ("" if name.endswith("/") else ".py")
        used = ", ".join(sorted(targets)) if name != "__init__" else "each on first use"
        lines.append(f"| [{name}]({path}) | {purpose(name)} | {used} |")
    return "\n".join(lines) + "\n"


def _id(name: str) -> str:
    return name.rstrip("/")


if __name__ == "__main__":
    PAGE.write_text(render())
