"""The house stands: imports run one way, login nodes need no JAX, rooms and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "sweeps", "launch")
# And everything in engine.
WITH_JAX = {"sweeps.trial", "sweeps.specimens", "sweeps.scores", "sweeps.scanned", "sweeps.sequential",
            "sweeps.aligned"}
SOURCES = sorted(path for room in (*ROOMS, "tests") for path in (ROOT / room).glob("*.py"))
PRODUCT = [path for path in SOURCES if path.parent.name != "tests"]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of every absolute import of a module, also of those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_run_from_launch_to_sweeps_to_engine(path):
    later = ROOMS[ROOMS.index(path.parent.name) + 1 :]
    assert not imported(parse(path)) & {*later, "tests"}


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_copyleft_packages_are_imported_lazily_or_not_at_all(path):
    top = ast.Module(
        body=[node for node in parse(path).body if isinstance(node, (ast.Import, ast.ImportFrom))],
        type_ignores=[],
    )
    assert not imported(top) & {"rsciio", "hyperspy", "astra", "abtem"}
    assert not imported(parse(path)) & {"astra", "abtem"}


def test_everything_but_the_engine_and_the_trial_imports_without_jax():
    modules = [
        f"{path.parent.name}.{path.stem}".removesuffix(".__init__")
        for path in PRODUCT
        if path.parent.name != "engine"
    ]
    modules = [module for module in modules if module not in WITH_JAX]
    code = (
        "import sys\nfor name in ('jax', 'jaxlib'): sys.modules[name] = None\nimport importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_small(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 450
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60
    }
    assert not long


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.stem != "__init__"], ids=name)
def test_modules_and_public_names_say_what_they_are(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_rooms_are_flat():
    folders = [
        path
        for room in ROOMS
        for path in (ROOT / room).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]
    assert not folders
