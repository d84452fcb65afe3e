"""The rules of the house, read off the source: which floor may import what, no pickle, no long file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("policies", "simulators", "algorithms")
FLOOR_1 = ("errors", "randomness", "registry", "specs", "types")
FOLDERS = ("embodied_rl", *WINGS, "scripts", "benchmarks", "tests")


def sources(*folders: str) -> list[Path]:
    """Python files below `folders` of the repository; links inside embodied_rl/ are not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(node: ast.AST, everywhere: bool) -> Iterator[tuple[str, int]]:
    """(module, line) of the imports in `node`; without `everywhere` only those that run when it is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not everywhere:
            continue
        elif everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, everywhere)


def found(path: Path, everywhere: bool) -> Iterator[tuple[str, str]]:
    """(module, "file:line") of the imports of `path`."""
    for module, line in imports(ast.parse(path.read_text(), str(path)), everywhere):
        yield module, f"{path.relative_to(ROOT)}:{line} imports {module}"


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_itself_and_floor_1(wing: str) -> None:
    allowed = [f"embodied_rl.{name}" for name in (wing, *FLOOR_1)]
    wrong = [
        where
        for path in sources(wing)
        for module, where in found(path, everywhere=True)
        if inside(module, "embodied_rl", *WINGS) and module != "embodied_rl" and not inside(module, *allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_floor_1_and_simulators_need_only_numpy_when_imported() -> None:
    floor_1 = [ROOT / "embodied_rl" / f"{name}.py" for name in ("__init__", *FLOOR_1)]
    wrong = [
        where
        for path in [*floor_1, *sources("simulators")]
        for module, where in found(path, everywhere=False)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "numpy", "embodied_rl"}
    ]
    assert not wrong, "\n".join(wrong)


def test_floor_1_imports_no_higher_floor() -> None:
    allowed = [f"embodied_rl.{name}" for name in FLOOR_1]
    wrong = [
        where
        for name in FLOOR_1
        for module, where in found(ROOT / "embodied_rl" / f"{name}.py", everywhere=True)
        if inside(module, "embodied_rl") and not inside(module, *allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_plans_are_worked_out_from_numbers_alone() -> None:
    parts = [f"embodied_rl.planner.{name}" for name in ("costs", "placement", "formulas", "events", "search")]
    files = [ROOT / part.replace(".", "/") for part in parts]
    wrong = [
        where
        for path in files
        for module, where in found(path.with_suffix(".py"), everywhere=True)
        if not inside(module, *sys.stdlib_module_names, "numpy", "embodied_rl.errors", *parts)
    ]
    assert not wrong, "\n".join(wrong)


LOADS_PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_no_file_loads_a_pickle() -> None:
    wrong = []
    for path in sources(*FOLDERS):
        for module, where in found(path, everywhere=True):
            if module.split(".")[0] in LOADS_PICKLES:
                wrong.append(where)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                allows = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                readers = {"yaml.load", "np.lib.format.read_array", *([] if tensors_only else ["torch.load"])}
                if allows or ast.unparse(node.func) in readers:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


def test_no_source_file_is_longer_than_500_lines() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*FOLDERS)}
    assert not {name: lines for name, lines in long.items() if lines > 500}


def test_the_package_holds_links_to_the_wings() -> None:
    for wing in WINGS:
        link = ROOT / "embodied_rl" / wing
        assert link.is_symlink()
        assert link.resolve() == ROOT / wing


LIST_NAMES = """
import sys
import embodied_rl
from embodied_rl import registry
for known in (registry.simulators, registry.policies, registry.algorithms, registry.recipes):
    assert known.names()
heavy = {"torch", "numpy", "gymnasium", "mani_skill", "sapien", "ray", "transformers", "lerobot"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_listing_names_imports_no_torch_and_no_simulator() -> None:
    output = subprocess.run(
        [sys.executable, "-c", LIST_NAMES], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert output.strip() == "[]"
