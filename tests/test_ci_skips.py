"""A skipped simulator or parity test fails in CI and is a plain skip elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GPU = Path("/dev/nvidiactl").exists()
FILES = {
    "simulators/test_call.py": "import pytest\ndef test_a():\n    pytest.skip('reason 1')\n",
    "simulators/test_mark.py": "import pytest\n@pytest.mark.skipif(True, reason='reason 2')\ndef test_a(): ...\n",
    "simulators/test_fixture.py": (
        "import pytest\n@pytest.fixture\ndef f():\n    pytest.skip('reason 3')\ndef test_a(f): ...\n"
    ),
    "parity/test_module.py": "import pytest\npytest.skip('reason 4', allow_module_level=True)\n",
    "parity/test_import.py": "import pytest\npytest.importorskip('no_such_renderer', reason='reason 5')\n",
    "simulators/test_gpu.py": "import pytest\n@pytest.mark.gpu\ndef test_a(): ...\n",
    "policies/test_other_area.py": "import pytest\ndef test_a():\n    pytest.skip('reason 6')\n",
    "parity/test_plain.py": "def test_a(): ...\ndef test_b():\n    assert False\n",
}


def run(folder: Path, **variables: str) -> str:
    """The summary of a pytest run over `FILES` with this repository's conftest."""
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = --continue-on-collection-errors\n")
    for name, source in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "EMBODIED_RL_CI"} | variables
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", str(folder)]
    child = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert child.returncode == 1, child.stdout
    return child.stdout


def test_in_ci_every_kind_of_skip_fails_with_its_reason(tmp_path: Path) -> None:
    output = run(tmp_path, EMBODIED_RL_CI="1")
    for reason in range(1, 6):
        assert f"must not be skipped in CI: reason {reason}\n" in output
    assert ("needs an NVIDIA GPU" in output) != GPU
    counts = f"2 failed, {2 if GPU else 1} passed, {1 if GPU else 2} skipped, 4 errors"
    assert counts in output, output


def test_elsewhere_a_skip_is_a_skip_with_its_reason(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert "must not be skipped" not in output
    for reason in range(1, 7):
        assert f"reason {reason}" in output
    assert f"1 failed, {2 if GPU else 1} passed, {6 if GPU else 7} skipped" in output, output
