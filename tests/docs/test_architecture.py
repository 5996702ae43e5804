"""Imports point one way, as the page on architecture says; those for type checkers as well."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# From the bottom to the top: a room may import from those below it only.
FLOORS = [
    "_version",
    "_control",
    "_checks",
    "_counts",
    "selection",
    "coding",
    "structures",
    "targets",
    "masking",
    "state",
    "leaves",
    "scores",
    "allocations",
    "choose",
    "schedules",
    "typing",
    "engines",
    "methods",
    "channels",
    "post_training",
    "initial",
    "initial_scores",
    "tickets",
    "attention",
    "nn",
    "analysis",
    "sae",
    "testing",
]
MODULES = [p for p in (ROOT / "jaxsparse").rglob("*.py") if p.parent != ROOT / "jaxsparse" or
           p.name != "__init__.py"]  # fmt: skip


def room(path):
    """The name right below the package: a module, or a folder of modules."""
    return path.relative_to(ROOT / "jaxsparse").parts[0].removesuffix(".py")


def dotted(path):
    """The name by which a module is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Dotted names of every import in a module: of functions, and of type checkers, too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_rooms_below_its_own(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        assert package not in ("experiments", "tools"), name
        if package == "pallas_kernels":
            assert room(path) in ("nn", "attention"), name
        if package == "jaxsparse" and rest:
            other = rest.split(".")[0]
            assert other == room(path) or FLOORS.index(other) < FLOORS.index(room(path)), name


def test_no_module_imports_itself_by_way_of_others():
    names = {dotted(p): p for p in MODULES}
    graph = {}
    for name, path in names.items():
        targets = [n if n in names else n.rpartition(".")[0] for n in imported(path)]
        graph[name] = {t for t in targets if t in names and t != name}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(names)


def test_the_core_imports_no_other_packages_than_it_declares():
    allowed = {"jax", "flax", "optax", "chex", "numpy", "jaxsparse"}
    core = FLOORS[: FLOORS.index("attention")]
    for path in (p for p in MODULES if room(p) in core):
        known = {n.split(".")[0] for n in imported(path)}
        foreign = known - allowed - set(sys.stdlib_module_names)
        assert not foreign, (path.name, foreign)


def test_kernels_know_nothing_of_the_library():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        packages = {name.split(".")[0] for name in imported(path)}
        assert not packages & {"jaxsparse", "experiments"}, path.name


def test_every_room_has_a_floor_and_is_on_the_page():
    rooms = {room(p) for p in MODULES}
    assert rooms <= set(FLOORS)
    missing = [
        name for name in rooms - {"_version"} if f"`{name}" not in PAGE and f"/{name}" not in PAGE
    ]
    assert missing == []


def test_methods_import_public_names_only():
    """What the library's own methods need, the method of a user can import as well."""
    for path in (ROOT / "jaxsparse" / "methods").glob("*.py"):
        private = [
            name
            for name in imported(path)
            if name.startswith("jaxsparse")
            and any(part.startswith("_") for part in name.split("."))
        ]
        assert not path.name.startswith("_") or path.name == "__init__.py", path.name
        assert private == [], (path.name, private)


# Who may sort on a device, and why; masks are found by counting, in `selection`.
SORTS = {"allocations.py": "LAMP's score of a weight is a sum over those that rank no lower"}


def test_nothing_is_sorted_outside_of_selection():
    names = {"sort", "argsort", "lexsort", "partition", "argpartition", "top_k", "approx_max_k"}
    arrays = {"jnp", "lax", "jax"}
    for path in (p for p in MODULES if room(p) not in ("selection", "channels")):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        found = {
            f.attr
            for f in calls
            if isinstance(f, ast.Attribute)
            and f.attr in names
            and isinstance(f.value, ast.Name)
            and f.value.id in arrays
        }
        assert not found or str(path.relative_to(ROOT / "jaxsparse")) in SORTS, (path.name, found)
