"""Bitmaps that start or stop recording at T0 exactly; bitmaps whose bits are a file's; zero_units()."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import cbwcore
from cbwcore._cbwcore import zero_units
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError
from cbwcore.options import SnapshotOptions
from cbwcore.snapshot import Wanted, take_snapshots

UNIT = 65536
CLUSTERS = 3000


def new_disk(tmp_path):
    path = tmp_path / "disk"
    with open(path, "wb") as f:
        f.truncate(CLUSTERS * UNIT)
    return cbwcore.Disk(path)


def write_each_cluster_once(disk, meanwhile):
    """Three guests; ``meanwhile`` runs once each has written some."""
    half = threading.Barrier(4)

    def guest(first):
        for i, c in enumerate(range(first, CLUSTERS, 3)):
            if i == 200:
                half.wait()
            disk.pwrite(b"x" * 512, c * UNIT)

    threads = [threading.Thread(target=guest, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    half.wait()
    result = meanwhile()
    for t in threads:
        t.join()
    return result


def dirty(bitmap):
    return [bitmap.is_dirty(c * UNIT) for c in range(CLUSTERS)]


def take(disk, tmp_path, **wanted):
    return take_snapshots([Wanted(disk, SnapshotOptions(target=tmp_path / "target"), **wanted)])[0]


def test_each_write_is_before_or_after_t0_for_the_bitmaps_as_for_the_snapshot(tmp_path):
    """What the snapshot has of a write the frozen bitmap has, alone; so has a copy as of T0."""
    with new_disk(tmp_path) as disk:
        parent, other = disk.bitmaps.add("parent"), disk.bitmaps.add("other")
        taken = write_each_cluster_once(disk, lambda: take(disk, tmp_path, freeze=parent, copies=[other]))
        before = [taken.snapshot.pread(1, c * UNIT) == b"x" for c in range(CLUSTERS)]
        assert dirty(parent) == before
        assert dirty(taken.copies[0]) == before
        assert dirty(taken.freeze.successor) == [not b for b in before]
        assert all(dirty(other))
        assert 600 <= sum(before) < CLUSTERS


@pytest.mark.parametrize("end", ["commit", "merge", "replace"])
def test_no_write_is_missed_at_the_end_of_a_freeze(tmp_path, end):
    """Guests write on while the bitmap takes over from its successor."""
    with new_disk(tmp_path) as disk:
        parent, rest = disk.bitmaps.add("parent"), DirtyBitmap(disk.size)
        disk.pwrite(b"0", 0)
        freeze = take(disk, tmp_path, freeze=parent).freeze
        rest.set_range(5 * UNIT, 1)
        args = {"commit": ("id",), "merge": (), "replace": (rest,)}[end]
        disk.pwrite(b"1", (CLUSTERS - 1) * UNIT)
        write_each_cluster_once(disk, lambda: getattr(freeze, end)(*args))
        assert all(dirty(parent))
        assert parent.enabled
        assert not parent.frozen
        assert not freeze.successor.enabled
        assert parent.since == ("id" if end == "commit" else None)
        with pytest.raises(ConfigError, match="left this job already"):
            freeze.merge()


def test_what_a_bitmap_has_after_a_freeze(tmp_path):
    with new_disk(tmp_path) as disk:
        parent, rest = disk.bitmaps.add("parent"), DirtyBitmap(disk.size)
        parent.since = "first"
        rest.set_range(2 * UNIT, 1)
        for end, args, left, since in [
            ("merge", (), [0, 1], "first"),
            ("replace", (rest,), [1, 2], None),
            ("commit", ("second",), [1], "second"),
        ]:
            disk.pwrite(b"0", 0)
            taken = take(disk, tmp_path, freeze=parent)
            disk.pwrite(b"1", UNIT)
            getattr(taken.freeze, end)(*args)
            taken.snapshot.close()
            assert [i for i, bit in enumerate(dirty(parent)) if bit] == left
            assert parent.since == since


def test_nobody_changes_a_frozen_bitmap(tmp_path):
    with new_disk(tmp_path) as disk:
        parent = disk.bitmaps.add("parent")
        taken = take(disk, tmp_path, freeze=parent)
        changes = [parent.enable, parent.disable, parent.clear, lambda: parent.merge(DirtyBitmap(disk.size))]
        changes += [lambda: parent.set_range(0, 1), lambda: disk.bitmaps.remove("parent")]
        for change in changes:
            with pytest.raises(ConfigError, match="in use by a job"):
                change()
        with pytest.raises(ConfigError, match="in use by a job"):
            take_snapshots([Wanted(disk, SnapshotOptions(target=tmp_path / "second"), freeze=parent)])
        assert not (tmp_path / "second").exists()
        assert "frozen" in repr(parent)
        taken.freeze.merge()
        parent.clear()


def test_a_bitmap_that_does_not_record_has_no_successor(tmp_path):
    with new_disk(tmp_path) as disk:
        parent = disk.bitmaps.add("parent", enabled=False)
        parent.set_range(0, 1)
        taken = take(disk, tmp_path, freeze=parent, copies=[parent])
        assert taken.freeze.successor is None
        assert list(taken.copies[0].ranges()) == [(0, UNIT)]
        disk.pwrite(b"1", 5 * UNIT)
        taken.freeze.commit("id")
        assert parent.count() == 0
        assert not parent.enabled


def test_too_many_bitmaps_switch_none_and_arm_nothing(tmp_path):
    with new_disk(tmp_path) as disk:
        parent, *others = [disk.bitmaps.add(f"{i}") for i in range(256)]
        with pytest.raises(ConfigError, match="at most 256 bitmaps"):
            take(disk, tmp_path, freeze=parent)
        disk.pwrite(b"x", 0)
        assert parent.enabled
        assert not parent.frozen
        assert all(m.count() == UNIT for m in (parent, *others))
        assert disk.stats().snapshots == 0
        others[0].disable()
        taken = take(disk, tmp_path, freeze=parent)
        taken.freeze.merge()


def test_the_bits_of_a_file_survive_kill_9(tmp_path):
    path = tmp_path / "bits"
    code = f"""
import os, signal
from cbwcore.bitmaps import DirtyBitmap
m = DirtyBitmap(1 << 30)
fd = os.open({os.fspath(path)!r}, os.O_RDWR | os.O_CREAT)
os.posix_fallocate(fd, 0, 4096 + m._mapped)
m._map_file(fd, 4096)
m.set_range(5 << 20, 1 << 20)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    m = DirtyBitmap(1 << 30)
    fd = os.open(path, os.O_RDWR)
    m._map_file(fd, 4096)
    os.close(fd)
    assert list(m.ranges()) == [(5 << 20, 1 << 20)]
    m.clear()
    assert m.count() == 0
    assert not any(path.read_bytes())


def test_a_place_in_a_file_that_cannot_be_mapped_is_an_error(tmp_path):
    m = DirtyBitmap(1 << 30)
    with pytest.raises(OSError, match="Bad file descriptor"):
        m._map_file(-1, 0)


def test_zero_units():
    assert zero_units(b"", 4) == b""
    assert zero_units(bytes(8) + b"\0\0\1\0" + bytes(3), 4) == b"\1\1\0\1"
    assert zero_units(memoryview(bytearray(65536 * 2)), 65536) == b"\1\1"
    assert zero_units(bytes(65535) + b"\1", 65536) == b"\0"
    with pytest.raises(ConfigError):
        zero_units(b"", 0)
