"""A week on one disk: each day a process of its own, whose guests write while a backup is made, and some end badly.

Every backup that was reported a success restores to its T0, to the byte; every other is absent or refused. No write
since the last success is missing from the bitmap, whatever happened."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from backup_support import CHUNK, UNIT
from engine_support import file_bytes
from programs_support import need

import cbwcore
from cbwcore.errors import StateError

DAY = Path(__file__).parent.parent / "backup_day.py"
SIZE = 16 * CHUNK + 3 * UNIT + 100
SLOW = {"speed": 40 * CHUNK}


class Week:
    """The disk, its backups, and which of them count."""

    def __init__(self, folder, seed):
        self.folder = folder
        self.disk = folder / "disk"
        self.rng = random.Random(seed)
        self.counted = []  # (image, file of its T0) of those that count, oldest first
        self.failed = []  # images of the others
        with open(self.disk, "wb") as f:
            f.truncate(SIZE)
            for offset in range(0, SIZE, 5 * UNIT):
                f.seek(offset)
                f.write(self.rng.randbytes(min(2 * UNIT, SIZE - offset)))

    def day(self, name, kind="ok", *, folder=None, **options):
        """Spend one; how it ended."""
        image = (folder or self.folder) / f"{name}.qcow2"
        if self.counted and options.setdefault("sync", "incremental") == "incremental":
            options.setdefault("backing", str(self.counted[-1][0]))
        plan = {
            "disk": str(self.disk),
            "image": str(image),
            "t0": str(self.folder / f"{name}.t0"),
            "seed": self.rng.randrange(1 << 30),
            "kind": kind,
            "after": self.rng.uniform(0.0, 0.5),
            "options": options,
        }
        done = subprocess.run(
            [sys.executable, DAY, json.dumps(plan)], capture_output=True, text=True, timeout=100, check=False
        )
        if kind == "kill":
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
        else:
            assert done.returncode == 0, done.stderr
        outcome = done.stdout.strip()
        # Killed when its image had its name already, before it could say so: that is a backup, and the newest.
        if outcome in ("full", "incremental") or (kind == "kill" and image.exists()):
            self.counted.append((image, plan["t0"]))
        else:
            self.failed.append(image)
        return outcome

    def check(self):
        """All that the module's docstring says."""
        for image in self.failed:
            with pytest.raises(StateError):
                cbwcore.restore(image, self.folder / "never")
            assert not (self.folder / "never").exists()
        target = self.folder / "restored"
        for image, t0 in self.counted:
            cbwcore.restore(image, target, overwrite=True)
            assert file_bytes(target) == file_bytes(t0), image
        self.check_bitmap(file_bytes(self.counted[-1][1]))

    def check_bitmap(self, before):
        with cbwcore.Disk(self.disk) as disk:
            bitmap = disk.bitmaps["daily"]
            assert bitmap.inconsistent is None
            assert not bitmap.frozen
            now = disk.pread(SIZE, 0)
            changed = [o for o in range(0, SIZE, UNIT) if now[o : o + UNIT] != before[o : o + UNIT]]
            assert [o for o in changed if not bitmap.is_dirty(o)] == []


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_week(tmp_path, seed, resources, needs, compress):
    """A full backup and six incremental ones; one more was cancelled, one killed, one met a full file system, and one a
    snapshot that broke."""
    need("qemu-img")
    with needs():
        small = Path(resources.mount("tmpfs", str(tmp_path / "small"), "-t", "tmpfs", "-o", "size=192k"))
    week = Week(tmp_path, seed)
    extra = {"compress": compress, "verify": True}
    assert week.day("sunday", sync="full", **extra) == "full"
    assert week.day("monday", **extra) == "incremental"
    assert week.day("cancelled", "cancel", **extra, **SLOW) == "JobCancelledError"
    assert week.day("tuesday", **extra) == "incremental"
    week.day("killed", "kill", **extra, **SLOW)
    assert week.day("wednesday", **extra) == "incremental"
    assert week.day("full-target", folder=small, **extra) == "OSError"
    assert week.day("thursday", **extra) == "incremental"
    broken = {"on_cbw_error": "break-snapshot", "fleece_limit": UNIT, "speed": 1, "workers": 1, "chunk_size": UNIT}
    assert week.day("broken", "break", **extra, **broken) == "SnapshotBrokenError"
    assert week.day("friday", **extra) == "incremental"
    assert week.day("saturday", **extra) == "incremental"
    assert len(week.counted) >= 7
    week.check()
    last = week.counted[-1][0]
    subprocess.run(["qemu-img", "check", "-q", last], check=True)
    restored = tmp_path / "restored"
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", last, restored], check=True)


@pytest.mark.parametrize("turn", range(4))
def test_days_that_are_killed(tmp_path, seed, turn):
    """Whenever the process dies: nothing is missing from the bitmap, and the next backup is exact."""
    week = Week(tmp_path, seed + turn)
    assert week.day("first", sync="full") == "full"
    for i in range(12):
        options = {} if wants_incremental(week.rng) else {"sync": "full"}
        week.day(f"day{i}", "kill", **options, **(SLOW if week.rng.randrange(2) else {}))
        week.check_bitmap(file_bytes(week.counted[-1][1]))
        if i % 4 == 3:
            assert week.day(f"well{i}") == "incremental"
            week.check()
    names = os.listdir(tmp_path)
    assert len([name for name in names if name.endswith(".partial")]) <= 12


def wants_incremental(rng):
    """Mostly incremental ones."""
    return rng.randrange(4) > 0
