"""What the tests of backup jobs share."""

import os
import random

import pytest
from backup_support import CHUNK, UNIT

import cbwcore


@pytest.fixture
def make_disk(tmp_path):
    """Disks with seeded data in some units and holes in others, closed in the end."""
    disks = []

    def make(size=8 * CHUNK, *, name="disk", seed=1, **options):
        path = tmp_path / name
        rng = random.Random(seed)
        with open(path, "wb") as f:
            f.truncate(size)
            for offset in range(0, size, 4 * UNIT):
                f.seek(offset)
                f.write(rng.randbytes(min(2 * UNIT, size - offset)))
        disks.append(cbwcore.Disk(path, **options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def no_backup(tmp_path):
    """Assert that nothing of a backup is left at a path."""

    def check(name):
        assert [entry for entry in os.listdir(tmp_path) if entry.startswith(name)] == []

    return check
