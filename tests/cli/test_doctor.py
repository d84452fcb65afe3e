import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from embodied_rl import doctor
from embodied_rl.cli import main
from embodied_rl.doctor import Finding, Trial, attempt


def test_a_trial_may_succeed_refuse_crash_or_hang() -> None:
    assert attempt("print('first'); print(__import__('sys').argv[1])", "fine") == Trial(True, "fine")
    assert attempt("raise SystemExit('no device')") == Trial(False, "no device")
    assert attempt("1 / 0") == Trial(False, "ZeroDivisionError: division by zero")
    assert attempt("import os; os.kill(os.getpid(), 11)") == Trial(False, "crashed with signal 11")
    began = time.monotonic()
    assert attempt("import time; time.sleep(60)", deadline=1.0) == Trial(False, "no answer within 1 s")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", "0", 8 * doctor.GIB), (str(4 * doctor.GIB), str(doctor.GIB), 3 * doctor.GIB)]
)
def test_free_memory_respects_the_container(tmp_path: Path, limit: str, used: str, free: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB\n")
    assert doctor.free_memory(tmp_path) == 8 * doctor.GIB
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.current").write_text(used + "\n")
    assert doctor.free_memory(tmp_path) == free
    assert doctor.free_memory(tmp_path / "nowhere") is None


def test_the_table_says_how_to_fix_what_is_missing() -> None:
    file = io.StringIO()
    found = [
        Finding("torch", True, "2.11.0", "uv sync"),
        Finding("EGL", False, "no [libEGL]", "apt-get install libegl1"),
    ]
    doctor.show(found, Console(file=file, width=120))
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines[1:] == ["ok torch 2.11.0", "missing EGL no [libEGL] apt-get install libegl1"]


def test_cheap_checks_answer() -> None:
    for check in (doctor.python, doctor.cores, doctor.memory, doctor.disk, doctor.egl, doctor.osmesa):
        found = check()
        assert found.name and found.remedy and isinstance(found.ok, bool)
    assert doctor.python().ok


def test_a_simulator_that_cannot_be_imported_is_missing() -> None:
    found = doctor.simulator("no_such_simulator")
    assert not found.ok and "unknown simulator 'no_such_simulator'" in found.detail


def test_doctor_exits_0_whatever_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda: [Finding("GPU", False, "none", "buy one")])
    assert main(["doctor"]) == 0
    assert "buy one" in capsys.readouterr().out
