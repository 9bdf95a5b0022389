"""All sections, in the order of the report; and the run of one."""

from __future__ import annotations

import time
from collections.abc import Callable

from cbwcore.bench.backup import BACKUP
from cbwcore.bench.bitmaps import BITMAP
from cbwcore.bench.curves import ARM, CLUSTER_SIZE, DISK_SIZE, FILL, SNAPSHOTS
from cbwcore.bench.holes import HOLES
from cbwcore.bench.matrix import MATRIX
from cbwcore.bench.nbd import NBD
from cbwcore.bench.pull import PULL
from cbwcore.bench.results import Outcome, Row
from cbwcore.bench.setting import Item, NotHere, Section, Setting
from cbwcore.bench.writes import CONTENTION, COPIED_WRITE, FIRST_WRITE, LARGE_WRITES, SNAPSHOT_READ
from cbwcore.errors import CbwError

__all__ = ["FAILED", "SECTIONS", "run_section"]

FAILED = "FAILED"  # in the note of an item
SECTIONS = {
    section.name: section
    for section in (
        FIRST_WRITE,
        COPIED_WRITE,
        LARGE_WRITES,
        CONTENTION,
        MATRIX,
        CLUSTER_SIZE,
        DISK_SIZE,
        FILL,
        SNAPSHOTS,
        ARM,
        SNAPSHOT_READ,
        HOLES,
        NBD,
        PULL,
        BACKUP,
        BITMAP,
    )
}


def run_section(section: Section, setting: Setting, step: Callable[[str], object]) -> Outcome:
    """All its items; one that fails, or cannot run here, is noted, and the others run. ``step`` is told of each."""
    rows: list[Row] = []
    notes: dict[str, None] = {}
    started = time.monotonic()
    try:
        for item in section.items:
            if setting.quick and not item.quick:
                continue
            step(f"{section.name}: {item.name}")
            run_item(item, setting, rows, notes)
    finally:
        setting.end_section()
    return Outcome(
        name=section.name,
        title=section.title,
        conditions=section.conditions,
        rows=tuple(rows),
        plots=section.plots,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def run_item(item: Item, setting: Setting, rows: list[Row], notes: dict[str, None]) -> None:
    """What it found, into ``rows`` and ``notes``."""
    try:
        for found in item.run(setting):
            if isinstance(found, str):
                notes[found] = None
            else:
                rows.append(found)
    except NotHere as e:
        notes[f"{item.name} left out: {e}"] = None
    except (OSError, CbwError) as e:
        notes[f"{item.name} {FAILED}: {' '.join(str(e).splitlines())}"] = None
