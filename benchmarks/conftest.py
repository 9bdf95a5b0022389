"""The cases of ``cbwcore bench`` under pytest-benchmark, and the tables at the end of the run.

``pytest benchmarks/`` runs them. Environment: CBWCORE_BENCH_QUICK=1 for a run of a minute or two, CBWCORE_BENCH_SIZE
for the bytes of the disk (whole MiB), CBWCORE_BENCH_ROUNDS, CBWCORE_BENCH_DIR for the files (default /dev/shm).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cbwcore.bench.results import Row, markdown
from cbwcore.bench.setting import Item, NotHere, Section, Setting
from cbwcore.errors import ConfigError

QUICK = os.environ.get("CBWCORE_BENCH_QUICK", "") not in ("", "0")
ROWS = pytest.StashKey[dict[str, list[Row]]]()
NOTES = pytest.StashKey[dict[str, None]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.stash[NOTES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(1800))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each item of the module's SECTIONS."""
    if "case" in metafunc.fixturenames:
        cases = [
            pytest.param((section, item), id=f"{section.name}-{item.name}")
            for section in metafunc.module.SECTIONS
            for item in section.items
            if item.quick or not QUICK
        ]
        metafunc.parametrize("case", cases)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for title, rows in config.stash[ROWS].items():
        terminalreporter.section(title)
        for line in markdown(rows):
            terminalreporter.write_line(line)
    for note in config.stash[NOTES]:
        terminalreporter.write_line(f"* {note}")


@pytest.fixture(scope="session")
def whole_setting() -> Iterator[Setting]:
    """A directory on tmpfs, gone after the run however it ends."""
    size, rounds = (int(os.environ.get(f"CBWCORE_BENCH_{name}", 0)) for name in ("SIZE", "ROUNDS"))
    parent = os.environ.get("CBWCORE_BENCH_DIR", "/dev/shm")
    with tempfile.TemporaryDirectory(prefix="cbwcore-bench-", dir=parent) as name:
        try:
            yield Setting(Path(name), size=size, rounds=rounds, quick=QUICK)
        except ConfigError as e:
            pytest.exit(f"{e}: see CBWCORE_BENCH_SIZE", 2)


@pytest.fixture(scope="module")
def setting(whole_setting: Setting) -> Iterator[Setting]:
    """What a section keeps is gone after the module."""
    yield whole_setting
    whole_setting.end_section()


@pytest.fixture
def measure(request: pytest.FixtureRequest, setting: Setting) -> Callable[[tuple[Section, Item]], None]:
    """Run a case; pytest-benchmark times the last of its sides, whose rows go into the section's table."""

    def pedantic(function: Callable[..., object], **options: Any) -> None:
        request.getfixturevalue("benchmark").pedantic(function, **options)

    def run(case: tuple[Section, Item]) -> None:
        section, item = case
        setting.pedantic = pedantic
        rows = request.config.stash[ROWS].setdefault(section.title, [])
        try:
            for found in item.run(setting):
                if isinstance(found, str):
                    request.config.stash[NOTES][found] = None
                else:
                    rows.append(found)
        except NotHere as e:
            pytest.skip(str(e))

    return run
