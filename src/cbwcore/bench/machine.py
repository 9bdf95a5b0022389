"""The machine and the versions, for the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import msgspec

import cbwcore
from cbwcore import _cbwcore
from cbwcore.bench.setting import BenchError, missing, program
from cbwcore.engines import ENGINES, choose_engine
from cbwcore.errors import ConfigError

__all__ = ["NOT_INSTALLED", "Machine", "look"]

NOT_INSTALLED = "not installed"
# The peers, and where their version is in what they answer.
VERSIONS = {
    "qemu-img": r"version (\S+)",
    "qemu-storage-daemon": r"version (\S+)",
    "nbdkit": r"nbdkit (\S+)",
    "fio": r"fio-(\S+)",
    "nbdcopy": r"nbdcopy (\S+)",
    "nbdfuse": r"nbdfuse (\S+)",
}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a run ran on. ``memory``: bytes; ``load``: of the last minute, before the run."""

    cpu: str
    cpus: int
    kernel: str
    memory: int
    load: float
    versions: dict[str, str]
    engines: dict[str, str]
    """Each I/O engine: ``yes``, or why not."""


def look() -> Machine:
    """This one."""
    return Machine(
        cpu=field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        cpus=len(os.sched_getaffinity(0)),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load=os.getloadavg()[0],
        versions=versions(),
        engines={io: engine(io) for io in ENGINES if io != "auto"},
    )


def field(path: str, name: str) -> str:
    """The first value of that name in a file of /proc."""
    try:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def versions() -> dict[str, str]:
    """Of cbwcore, of what it stands on, and of the peers."""
    found = {"cbwcore": cbwcore.__version__, "Python": platform.python_version()}
    built = _cbwcore.io_uring_state()[0]
    found["liburing"] = (_cbwcore.LIBURING or "version unknown") if built else "not in this build"
    found |= {name: importlib.metadata.version(name) for name in ("numpy", "bitarray")}
    for name, pattern in VERSIONS.items():
        found[name] = NOT_INSTALLED if missing(name) else version(name, pattern)
    return found


def version(name: str, pattern: str) -> str:
    """As the program tells it."""
    try:
        match = re.search(pattern, program(name, "--version", timeout=20))
    except (BenchError, OSError):
        return "unknown"
    return match[1].rstrip(",") if match else "unknown"


def engine(io: str) -> str:
    """Whether this build has an I/O engine."""
    try:
        choose_engine(io)
    except ConfigError as e:
        return str(e)
    return "yes"
