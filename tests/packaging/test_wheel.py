"""The wheel ships the three wings inside `embodied_rl`, and nobody else's `policies` folder gets in their way."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
WINGS = ("policies", "simulators", "algorithms")


def test_the_wings_are_plain_folders_inside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    assert not [name for name, entry in entries.items() if stat.S_ISLNK(entry.external_attr >> 16)]
    assert {name.split("/")[0] for name in entries} == {"embodied_rl", "embodied_rl-0.1.0.dist-info"}
    for wing in WINGS:
        sources = {f"embodied_rl/{path.relative_to(ROOT)}" for path in (ROOT / wing).rglob("*.py")}
        assert sources, wing
        assert sources <= entries.keys()


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = "embodied_rl-0.1.0.dist-info"
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "embodied-rl = embodied_rl.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


IMPORT_OURS = """
import embodied_rl.algorithms.base, embodied_rl.policies.base, embodied_rl.simulators.base
print(embodied_rl.__file__)
print(embodied_rl.policies.base.__file__)
import policies
print(policies.__file__)
"""


def test_a_foreign_policies_folder_does_not_shadow_ours(site: Path, tmp_path: Path, python: Callable[..., str]) -> None:
    for wing in WINGS:
        (tmp_path / wing).mkdir()
        (tmp_path / wing / "__init__.py").write_text("base = 'someone else'\n")
    package, policy, foreign = python(IMPORT_OURS, tmp_path, site, cwd=tmp_path).split()
    assert Path(package) == site / "embodied_rl" / "__init__.py"
    assert Path(policy) == site / "embodied_rl" / "policies" / "base.py"
    assert Path(foreign) == tmp_path / "policies" / "__init__.py"
