"""Imports point one way, as the page on architecture says."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
AXES = "structures scores allocations schedules targets masking plan initial summary"
# From the bottom to the top: a module may import from its own floor and from those below it.
FLOORS = [
    {"_version", "_search", "_counts", "selection"},
    set(AXES.split()),
    {"engines"},
    {"methods"},
    {"nn", "analysis", "testing"},
]
MODULES = [p for p in (ROOT / "jaxsparse").rglob("*.py") if p.parent != ROOT / "jaxsparse" or
           p.name != "__init__.py"]  # fmt: skip


def room(path):
    """The name right below the package: a module, or a folder of modules."""
    return path.relative_to(ROOT / "jaxsparse").parts[0].removesuffix(".py")


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def imported(path):
    """Dotted names that a module imports when it runs (not for types only)."""
    found, todo = [], [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        todo += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_its_own_floor_or_below(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        assert package != "experiments", name
        if package == "pallas_kernels":
            assert room(path) == "nn", name
        if package == "jaxsparse" and rest:
            assert floor(rest.split(".")[0]) <= floor(room(path)), name


def test_kernels_know_nothing_of_the_library():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        packages = {name.split(".")[0] for name in imported(path)}
        assert not packages & {"jaxsparse", "experiments"}, path.name


def test_every_room_is_on_the_page():
    rooms = {room(p) for p in MODULES} - {"_version"}
    missing = [name for name in rooms if f"{name}.py" not in PAGE and f"{name}/" not in PAGE]
    assert missing == []
