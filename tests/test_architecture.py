"""Imports only ever go down the stations, there is no cycle, and each boundary of the architecture holds."""

from __future__ import annotations

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion_lens"

ORDER = (
    "base", "results", "plots", "model", "judging", "measuring", "features", "steering", "methods", "interop",
    "portraits", "lens", "fit", "studies", "studio", "ui", "cli",
)  # fmt: skip
"""The stations, bottom up: a package imports itself and those before it."""

TORCH_FREE = ("base", "results", "plots")
"""Opened before torch loads; what they import of it, they import late."""


def modules() -> dict[str, Path]:
    """Every module of a station by its dotted name inside the package; a package goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
            found[name] = path
    return found


MODULES = modules()


def station(module: str) -> str:
    """The package that a module stands in."""
    return module.split(".")[0]


def imports(path: Path, *, at_import: bool = False) -> list[str]:
    """Full names of what a file imports, ``a.b.c`` for ``from a.b import c``; ``at_import``: at its top level alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inner(path: Path) -> set[str]:
    """The package's modules that a file imports; "" stands for the package root itself."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "diffusion_lens":
            continue
        rest = parts[1:]
        while rest and ".".join(rest) not in MODULES:
            rest = rest[:-1]
        found.add(".".join(rest))
    return found


def test_every_folder_is_a_station_and_nothing_lies_beside_them() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ORDER)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_tests_stand_in_folders_of_the_same_names() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"browser", "data"} <= set(ORDER)
    loose = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert loose <= {"test_architecture.py", "test_figures_of_0_4.py"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    own = ORDER.index(station(name))
    for other in inner(MODULES[name]) - {""}:
        assert ORDER.index(station(other)) <= own, f"{name} imports {other}, which stands above it"


def test_there_is_no_cycle() -> None:
    graph = {name: inner(path) - {"", name} for name, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_imports_the_package_root(name: str) -> None:
    assert "" not in inner(MODULES[name]), f"{name} imports a name from the package root"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_interface_knows_gradio(name: str) -> None:
    if station(name) != "ui":
        assert not [i for i in imports(MODULES[name]) if i.split(".")[0] == "gradio"]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if station(n) == "plots"))
def test_plots_see_only_results(name: str) -> None:
    others = {station(n) for n in inner(MODULES[name])}
    assert others <= {"plots", "results", "base"}, f"{name} imports from {others}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if station(n) in TORCH_FREE))
def test_results_open_before_torch_loads(name: str) -> None:
    heavy = {i.split(".")[0] for i in imports(MODULES[name], at_import=True)} & {"torch", "diffusers", "transformers"}
    assert not heavy or name in TORCH_NEEDED, f"{name} imports {heavy}"


TORCH_NEEDED = ("base.checkpoints", "base.precision", "base.processes", "base.resume", "base.weights")
"""Modules of ``base`` that work on tensors; nothing that shows stored results imports them."""


def test_statistics_never_see_a_diffusion_model() -> None:
    reached, todo = set(), ["results.metrics", "results.stats", "measuring.balance"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo.extend(inner(MODULES[name]) - {""})
    assert not {name for name in reached if station(name) in ("model", "lens")}
    for name in reached:
        assert not [i for i in imports(MODULES[name]) if i.split(".")[0] == "diffusers"]


def test_the_checks_themselves_see_imports(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "from diffusion_lens.results import stats\nfrom diffusion_lens import DiffusionLens\n"
        "def f():\n    import diffusion_lens.features.sae as s\n    from diffusion_lens.base.types import LensError\n"
    )
    assert inner(tmp_path / "m.py") == {"", "results.stats", "features.sae", "base.types"}
    assert imports(tmp_path / "m.py", at_import=True) == [
        "diffusion_lens.results.stats",
        "diffusion_lens.DiffusionLens",
    ]


def test_the_picture_of_the_structure_is_of_todays_imports() -> None:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "docs" / "structure.py")
    assert spec is not None and spec.loader is not None
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    assert structure.PICTURE.read_text(encoding="utf-8") == structure.draw(), "run: make picture"
