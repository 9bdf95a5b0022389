"""Who has a bitmap file: read-only, other processes, and what is written while it closes."""

import os
import subprocess
import sys
import threading

import pytest
from bitmap_support import (
    SIZE,
    SLOT,
    UNIT,
    assert_all_there,
    content,
    freeze,
    granules,
    killed,
    poke,
    sidecar,
)

import cbwcore
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError

# ---- read-only ----


def test_read_only(path):
    before = content(sidecar(path)), os.stat(sidecar(path)).st_mtime_ns
    with cbwcore.Disk(path, read_only=True) as disk, cbwcore.Disk(path, read_only=True) as second:
        daily = disk.bitmaps["daily"]
        assert granules(second.bitmaps["daily"]) == granules(daily) == {2, 3}
        assert daily.persistent
        assert not daily.enabled
        assert daily.since == "monday"
        changes = [daily.enable, daily.disable, daily.clear, lambda: daily.merge(DirtyBitmap(SIZE))]
        changes += [lambda: daily.set_range(0, 1), lambda: disk.bitmaps.remove("daily"), disk.bitmaps.reset]
        changes += [lambda: disk.bitmaps.add("x", persistent=True), lambda: freeze(disk, "daily")]
        changes += [lambda: setattr(daily, "since", None)]
        for change in changes:
            with pytest.raises(ConfigError, match="open read-only"):
                change()
        disk.bitmaps.add("in memory")
    assert before == (content(sidecar(path)), os.stat(sidecar(path)).st_mtime_ns)


def test_read_only_after_a_kill_shows_all_and_changes_nothing(path):
    def job():
        disk = cbwcore.Disk(path)
        freeze(disk, "daily")
        disk.pwrite(b"x", 7 * UNIT)

    killed(job)
    before = content(sidecar(path))
    with cbwcore.Disk(path, read_only=True) as disk:
        assert granules(disk.bitmaps["daily"]) == {2, 3, 7}
    assert content(sidecar(path)) == before


def test_read_only_without_a_file(place):
    path = place / "disk"
    path.write_bytes(b"x" * 10)
    with cbwcore.Disk(path, read_only=True) as disk:
        assert disk.bitmaps.problem is None
    assert os.listdir(place) == ["disk"]


# ---- who has it ----


def test_two_disks_cannot_have_one_file(path, place):
    other = place / "other"
    other.write_bytes(bytes(SIZE))
    with cbwcore.Disk(path):
        with pytest.raises(StateError, match=r"cbw-bitmaps is in use: another disk or process"):
            cbwcore.Disk(other, bitmaps=sidecar(path))
        cbwcore.Disk(other).close()  # nothing of it was left open
        with pytest.raises(ConfigError, match="disk is in use"):
            cbwcore.Disk(path, read_only=True)
    with cbwcore.Disk(path, read_only=True), pytest.raises(StateError, match="is in use"):
        cbwcore.Disk(other, bitmaps=sidecar(path))
    assert_all_there(path)


def test_two_processes(path):
    code = f"import cbwcore; cbwcore.Disk({path!r}, bitmaps={sidecar(path)!r})"
    with cbwcore.Disk(path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "ConfigError" in done.stderr
    assert "is in use" in done.stderr


def test_a_file_that_cannot_be_opened_is_not_passed_over(path, place):
    os.unlink(sidecar(path))
    os.symlink(sidecar(path), sidecar(path))
    with pytest.raises(OSError, match="Too many levels"):
        cbwcore.Disk(path)
    os.unlink(sidecar(path))
    os.mkdir(sidecar(path))
    with pytest.raises(IsADirectoryError):
        cbwcore.Disk(path)
    os.rmdir(sidecar(path))
    cbwcore.Disk(path).close()


def test_a_forked_child_changes_nothing_and_keeps_nothing(path):
    disk = cbwcore.Disk(path)
    daily = disk.bitmaps["daily"]
    go, ready = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            changes = [
                daily.clear,
                daily.disable,
                lambda: daily.set_range(0, SIZE),
                lambda: disk.bitmaps.remove("daily"),
            ]
            changes += [lambda: disk.bitmaps.add("x", persistent=True), disk.bitmaps.reset]
            for change in changes:
                with pytest.raises(ValueError, match="before a fork"):
                    change()
            disk.close()
            os.write(ready[1], b".")
            os.read(go[0], 1)
            status = 0
        finally:
            os._exit(status)
    os.read(ready[0], 1)
    disk.pwrite(b"x", 20 * UNIT)
    disk.close()
    with cbwcore.Disk(path) as again:  # nobody holds a lock while the child lives
        assert granules(again.bitmaps["daily"]) == {2, 3, 20}
    os.write(go[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    for fd in (*go, *ready):
        os.close(fd)


def test_nothing_is_left_open(path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    cbwcore.Disk(path).close()
    with cbwcore.Disk(path) as disk:
        disk.bitmaps.reset()
        disk.bitmaps.add("x", persistent=True)
    poke(sidecar(path), 0, bytes(2 * SLOT))
    cbwcore.Disk(path).close()
    os.truncate(path, 5)
    cbwcore.Disk(path).close()
    assert count() == before


# ---- what is written while it closes ----


def test_writes_that_race_with_close_are_recorded(path):
    disk = cbwcore.Disk(path)
    disk.bitmaps["daily"].clear()
    done = [set(), set()]

    def guest(mine):
        unit = 0
        while True:
            try:
                disk.pwrite(b"x", unit % 100 * UNIT)
            except ValueError:
                return
            done[mine].add(unit % 100)
            unit += 7

    threads = [threading.Thread(target=guest, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    while not all(done):
        pass
    disk.close()
    for t in threads:
        t.join()
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) >= done[0] | done[1]


def test_a_write_just_before_the_disk_closes_is_recorded(path):
    class Closing(cbwcore.Disk):
        def _close(self):
            self.pwrite(b"x", 77 * UNIT)
            super()._close()

    Closing(path).close()
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {2, 3, 77}
