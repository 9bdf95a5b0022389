"""Fixtures of the benchmarks, and the table at the end of the run.

``pytest benchmarks/`` runs them. Environment: CBWCORE_BENCH_QUICK=1 for a run of about a minute, CBWCORE_BENCH_SIZE for
the bytes of the disk (default 1 GiB; a multiple of 1 MiB), CBWCORE_BENCH_ROUNDS, CBWCORE_BENCH_DIR for the files
(default /dev/shm).
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from harness import ROUNDS, SIZE, Files, Floor, Row, compare, interleave, markdown

ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[ROWS]:
        return
    terminalreporter.section("cbwcore beside its floor and its peer")
    terminalreporter.write_line(
        f"disk of {SIZE >> 20} MiB, {ROUNDS} rounds, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the end; "
        "median (fastest–slowest); a ratio is the median of the rounds' ratios"
    )
    terminalreporter.write_line("")
    for line in markdown(config.stash[ROWS]):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory on tmpfs, gone after the run however it ends."""
    parent = os.environ.get("CBWCORE_BENCH_DIR", "/dev/shm")
    needed = 2 * SIZE + (64 << 20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        pytest.exit(
            f"{parent} has {free >> 20} MiB free, the benchmarks need {needed >> 20}: see CBWCORE_BENCH_SIZE", 2
        )
    with tempfile.TemporaryDirectory(prefix="cbwcore-bench-", dir=parent) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def files(place: Path) -> Files:
    return Files.make(place)


@pytest.fixture(scope="session")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Floor:
    return Floor(tmp_path_factory.mktemp("floor"))


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The table so far."""
    return request.config.stash[ROWS]


@pytest.fixture
def rounds(benchmark: Any) -> Callable[..., dict[str, list[float]]]:
    """interleave(), for tests that make rows of their own."""
    return functools.partial(interleave, benchmark)


@pytest.fixture
def beside(benchmark: Any, rows: list[Row]) -> Callable[..., None]:
    """compare(), with its row added to the table."""
    return lambda case, **options: rows.append(compare(benchmark, case, **options))
