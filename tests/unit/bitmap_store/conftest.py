"""A disk with persistent bitmaps; a machine that went down."""

import uuid

import pytest
from bitmap_support import SIZE, UNIT

import cbwcore
from cbwcore import bitmap_file


@pytest.fixture
def path(place):
    """A disk with the persistent bitmaps daily (some bits, an epoch) and odd (4 KiB, disabled)."""
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps.add("daily", persistent=True)
        odd = disk.bitmaps.add("ödd", granularity=4096, enabled=False, persistent=True)
        disk.pwrite(b"x" * 10, 3 * UNIT - 5)
        odd.set_range(SIZE - 1, 1)
        daily.since = "monday"
    return path


@pytest.fixture
def other_boot(monkeypatch):
    """``other_boot()``: the machine has gone down and come up again."""
    return lambda: monkeypatch.setattr(bitmap_file, "boot_id", lambda: str(uuid.uuid4()))
