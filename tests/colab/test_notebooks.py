"""Every notebook runs from top to bottom, as a reader runs it, and is stored without outputs."""

import ast
import json
import os
import pathlib
import re

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
FIRST = "quickstart"


def read(path):
    return nbformat.read(path, as_version=4)


def test_the_notebooks_that_the_readme_of_the_folder_lists_are_those_that_exist():
    listed = (ROOT / "colab" / "README.md").read_text()
    assert all(f"]({path.name})" in listed for path in NOTEBOOKS)
    assert listed.count(".ipynb)") == len(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_stripped(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id
            assert not cell.metadata, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_first_code_cell_installs_in_colab_only(path):
    cell = next(c for c in read(path).cells if c.cell_type == "code")
    lines = cell.source.splitlines()
    install = [i for i, line in enumerate(lines) if "%pip install" in line]
    assert len(install) == 1
    assert lines[install[0] - 1] == 'if "google.colab" in sys.modules:'
    assert lines[install[0]].startswith("    ")


def test_the_address_of_the_repository_is_the_same_everywhere():
    """That of mkdocs.yml; CONTRIBUTING.md lists the places and has the command that changes all."""
    (address,) = re.findall(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert f"repository-code: {address}\n" in (ROOT / "CITATION.cff").read_text()
    for path in NOTEBOOKS:
        assert f'git+{address}\\"' in path.read_text(), path.name
    assert address in (ROOT / "CONTRIBUTING.md").read_text()
    text = [*ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "colab").iterdir()]
    text += [p for room in ("jaxsparse", "experiments") for p in (ROOT / room).rglob("*.py")]
    for path in text:
        if path.is_file():
            found = re.findall(r"https://github\.com/[\w.-]+/jaxsparse\b", path.read_text())
            assert set(found) <= {address}, path.name


def test_the_cycles_in_a_notebook_are_those_of_the_documentation():
    stored = json.loads((ROOT / "docs" / "kernels" / "block_sparse_matmul.json").read_text())["tpu"]
    found = {(0, 0.0): {}, **{(b, s): {} for b in (128, 256, 512) for s in (0.5, 0.75, 0.9)}}
    for key, result in stored.items():
        topology, name, options = json.loads(key)
        case = options.get("block", 0), options.get("sparsity", 0.0)
        plain = set(options) <= {"block", "sparsity"} or options == {"size": 4096}
        if name in ("tpu_dense", "tpu_block_sparse") and plain and case in found:
            found[case][topology.split(":")[0]] = round(result["cycles"] / 1e3)
    cells = read(ROOT / "colab" / "structured_and_fast.ipynb").cells
    (cell,) = (c for c in cells if c.source.startswith("CYCLES = "))
    table = ast.literal_eval(ast.parse(cell.source).body[0].value)
    for generation, layers in table.items():
        for name, cycles in layers.items():
            for sparsity, value in cycles.items():
                case = (int(name.split()[-1]), sparsity) if sparsity else (0, 0.0)
                assert value == found[case][generation], (generation, name, sparsity)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_only_public_names_are_used(path):
    for cell in read(path).cells:
        if cell.cell_type != "code" or "%pip" in cell.source:
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = (node.module or "").split(".") + [a.name for a in node.names]
            elif isinstance(node, ast.Import):
                names = [part for a in node.names for part in a.name.split(".")]
            else:
                continue
            private = [n for n in names if n.startswith("_")]
            assert not private, (cell.id, private)


# `make test` runs the first notebook that a reader opens, `make test-slow` the others.
RUN = [p if p.stem == FIRST else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS]


@pytest.mark.parametrize("path", RUN, ids=NAMES)
def test_the_notebook_runs_from_top_to_bottom(path, tmp_path):
    from nbclient import NotebookClient

    # The reader's environment, but XLA quick: no eight devices, unless the notebook asks for them.
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host\S+", "", os.environ["XLA_FLAGS"])
    notebook = read(path)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=environment)
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert not any(o.output_type == "error" for o in shown)
