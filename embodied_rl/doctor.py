"""What this machine can run, and the command that fixes the rest: `embodied-rl doctor`.

Everything that may crash, hang or take long is tried in a child process with a deadline.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embodied_rl import registry

DEADLINE = 120.0
"""Seconds for one trial; the first import of a simulator reads hundreds of megabytes."""
GIB = 2**30

_EGL = """
import ctypes, ctypes.util, sys
egl = ctypes.CDLL(ctypes.util.find_library("EGL") or sys.exit("no libEGL"))
pointer, count, devices = ctypes.c_void_p, ctypes.c_int(), (ctypes.c_void_p * 16)()
egl.eglGetProcAddress.restype = pointer
def function(name, result, *arguments):
    return ctypes.CFUNCTYPE(result, *arguments)(egl.eglGetProcAddress(name) or sys.exit("libEGL is too old"))
query = function(b"eglQueryDevicesEXT", ctypes.c_uint, ctypes.c_int, pointer, pointer)
display_of = function(b"eglGetPlatformDisplayEXT", pointer, ctypes.c_uint, pointer, pointer)
egl.eglInitialize.argtypes = [pointer, pointer, pointer]
query(16, devices, ctypes.byref(count))
EGL_PLATFORM_DEVICE_EXT = 0x313F
displays = [display_of(EGL_PLATFORM_DEVICE_EXT, device, None) for device in devices[:count.value]]
usable = sum(bool(display) and bool(egl.eglInitialize(display, None, None)) for display in displays)
print(f"{usable} of {count.value} devices") if usable else sys.exit(f"none of {count.value} EGL devices opens")
"""
_OSMESA = """
import ctypes, ctypes.util, sys
ctypes.CDLL(ctypes.util.find_library("OSMesa") or sys.exit("no libOSMesa")).OSMesaCreateContext
print("found")
"""
_GPU = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
free, total = torch.cuda.mem_get_info()
print(f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
"""
_SIMULATOR = """
import sys
from embodied_rl import registry
tasks = registry.tasks(sys.argv[1])
ready = sum(not task.missing for task in tasks)
if tasks and not ready:
    sys.exit(f"none of {len(tasks)} tasks is ready; {tasks[0].missing}")
print(f"{ready} of {len(tasks)} tasks are ready" if tasks else "")
"""


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    """A command or a sentence, when not ok."""


class Trial(NamedTuple):
    """How a child process ended."""

    ok: bool
    text: str
    """Last line of its output, or why it failed."""


def attempt(code: str, *arguments: str, deadline: float = DEADLINE) -> Trial:
    """Run Python `code` in a child process; a crash or a hang is an answer like any other."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=deadline, check=False
        )
    except subprocess.TimeoutExpired:
        return Trial(False, f"no answer within {deadline:.0f} s")
    output = child.stdout if child.returncode == 0 else child.stderr
    last = (output.strip().splitlines() or [""])[-1]
    if child.returncode < 0:
        last = f"crashed with signal {-child.returncode}"
    return Trial(child.returncode == 0, last)


def python() -> Finding:
    """The interpreter."""
    ok = sys.version_info[:2] == (3, 12)
    return Finding("Python", ok, platform.python_version(), "uv python install 3.12")


def torch() -> Finding:
    """PyTorch."""
    trial = attempt("import torch; print(torch.__version__)")
    return Finding("torch", trial.ok, trial.text, "uv sync")


def cores() -> Finding:
    """CPU cores this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("CPU cores", count >= 2, str(count), "training runs, but simulators and learner share one core")


def memory() -> Finding:
    """Memory a run may still take, cgroup limits included."""
    free = free_memory()
    enough = free is None or free >= 3 * GIB
    detail = "unknown" if free is None else f"{free / GIB:.1f} GiB free"
    return Finding("memory", enough, detail, "close other programs, or use fewer --simulator.workers")


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated; None where the system does not tell."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free  # no cgroup, no limit
    return free


def disk() -> Finding:
    """Room for run folders here."""
    free = shutil.disk_usage(Path.cwd()).free
    return Finding("disk", free >= 2 * GIB, f"{free / GIB:.1f} GiB free in {Path.cwd()}", "give --out on another disk")


def gpu() -> Finding:
    """A CUDA device that torch can use."""
    trial = attempt(_GPU)
    return Finding("GPU", trial.ok, trial.text, "optional; needs an NVIDIA driver (nvidia-smi must work)")


def vulkan() -> Finding:
    """Rendering in ManiSkill; state observations do without."""
    from embodied_rl.simulators import vulkan

    problem = vulkan.problem(DEADLINE)
    driver = "software" if vulkan.environment() else "system driver"
    return Finding("Vulkan (ManiSkill images)", problem is None, problem or driver, f"bash {vulkan.SETUP}")


def egl() -> Finding:
    """Off-screen OpenGL on a GPU or in software."""
    trial = attempt(_EGL)
    return Finding("EGL (MuJoCo images)", trial.ok, trial.text, "sudo apt-get install libegl1 libgl1-mesa-dri")


def osmesa() -> Finding:
    """Off-screen OpenGL in software."""
    trial = attempt(_OSMESA)
    return Finding("OSMesa (MuJoCo images)", trial.ok, trial.text, "sudo apt-get install libosmesa6")


def simulator(name: str) -> Finding:
    """How many tasks of a registered simulator have all they need here."""
    trial = attempt(_SIMULATOR, name)
    return Finding(f"simulator {name}", trial.ok, trial.text, "embodied-rl list simulators --tasks tells more")


def findings() -> list[Finding]:
    """Everything, in the order of the table; trials run at the same time, one per core."""
    checks: list[Callable[[], Finding]] = [python, torch, cores, memory, disk, gpu, vulkan, egl, osmesa]
    checks += [lambda name=name: simulator(name) for name in registry.simulators.names()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda check: check(), checks))


def show(found: Iterable[Finding], console: Console) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "what", "found", "how to fix"):
        table.add_column(column, overflow="fold")
    for each in found:
        sign = "[green]ok[/]" if each.ok else "[yellow]missing[/]"
        table.add_row(sign, each.name, escape(each.detail), "" if each.ok else escape(each.remedy))
    console.print(table)


def main() -> None:
    """Look and print; never fails because something is missing."""
    console = Console()
    with console.status("trying everything once ..."):
        found = findings()
    show(found, console)
