"""Imports only ever go down, there is no cycle, and each boundary of the architecture holds."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion_lens"

BOTTOM = {"types", "config"}
FOUNDATION = {
    "artifacts", "sheets", "records", "pipelines", "hooks", "codec", "weights", "sae", "probes", "stats", "settings",
    "calibration", "resume", "memory", "placement", "run_options", "precision", "preview",
}  # fmt: skip
TOP = {
    "lens", "lens_folder", "report", "check", "checks", "fit", "fit_config", "fit_defaults", "fit_estimate",
    "fit_measure", "fit_stages", "fit_write",
}  # fmt: skip
APP = {"ui", "app", "__main__", "cli"}
MODEL_MODULES = {"pipelines", "hooks", "generate", "denoise", "activations", "lens", "lens_folder"}


def layer(module: str) -> int:
    """Height of a module, by its first name: what is not named above lies in the middle (methods, sweep, train, …)."""
    first = module.split(".")[0]
    for height, names in enumerate((BOTTOM, FOUNDATION, None, TOP, APP)):
        if names is not None and first in names:
            return height
    return 2


def modules() -> dict[str, Path]:
    """Every module by its name inside the package (``app`` for app.py; packages by their own name)."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    if (ROOT / "app.py").is_file():
        found["app"] = ROOT / "app.py"
    return found


MODULES = modules()


def imports(path: Path) -> list[str]:
    """Full names of everything imported anywhere in a file; ``a.b.c`` for ``from a.b import c``."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    for other in inner(MODULES[name]) - {""}:
        assert layer(other) <= layer(name), f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"


def test_there_is_no_cycle() -> None:
    graph = {name: inner(path) - {"", name} for name, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"app"}))
def test_nobody_imports_the_package_root(name: str) -> None:
    assert "" not in inner(MODULES[name]), f"{name} imports a name from the package root"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_interface_knows_gradio(name: str) -> None:
    if name.split(".")[0] not in ("ui", "app"):
        assert not [i for i in imports(MODULES[name]) if i.split(".")[0] == "gradio"]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] == "plots"))
def test_plots_see_only_types(name: str) -> None:
    others = {n for n in inner(MODULES[name]) if n != "types" and n.split(".")[0] != "plots"}
    assert not others, f"{name} imports {others}"


def test_metrics_never_see_a_diffusion_model() -> None:
    reached, todo = set(), ["metrics"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo.extend(inner(MODULES[name]) - {""})
    assert not reached & MODEL_MODULES
    for name in reached:
        assert not [i for i in imports(MODULES[name]) if i.split(".")[0] == "diffusers"]


def test_the_checks_themselves_see_imports(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "from diffusion_lens import stats, DiffusionLens\n"
        "def f():\n    import diffusion_lens.sae as s\n    from diffusion_lens.types import LensError\n"
    )
    assert inner(tmp_path / "m.py") == {"", "stats", "sae", "types"}
