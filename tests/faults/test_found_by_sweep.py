"""What the syscall sweep has found, each by itself."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import cbwcore
from cbwcore.images.partial import PartialFile

SIZE = 6 * 65536 + 1000
NO_MEMORY = """
import ctypes, errno, sys
import cbwcore

cbwcore.Disk(sys.argv[1]).close()
libc, failed = ctypes.CDLL(None), 0
for n in range(10):
    libc.sweep_on(13, ctypes.c_uint64(n), ctypes.c_uint64(1), 0, errno.ENOMEM)
    try:
        disk = cbwcore.Disk(sys.argv[1])
    except MemoryError:
        failed += 1
    else:
        disk.close()
    libc.sweep_off()
print(failed)
"""


@pytest.fixture
def disk(place):
    (place / "disk").write_bytes(os.urandom(SIZE))
    with cbwcore.Disk(place / "disk") as disk:
        yield disk


@pytest.fixture
def no_threads(monkeypatch):
    """As where the system has no more of them."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def descriptors():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if "/proc/" not in path)


def close_fails(monkeypatch, name):
    """os.close() of files called that says EIO, though they are closed, as Linux does it; the names that it hit."""
    close, hit = os.close, []

    def failing_close(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        close(fd)
        if path.name == name:
            hit.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing_close)
    return hit


def full(disk, name="full.qcow2", **options):
    return disk.backup(Path(disk.path).parent / name, format="qcow2", **options)


# ---- the core ----


def test_no_memory_for_a_disk(shim, place):
    """It died of it: a disk that never came to be was asked whether it is closed."""
    (place / "disk").write_bytes(bytes(SIZE))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_MEMORY, place / "disk"],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 < int(done.stdout) < 10


# ---- jobs ----


def test_a_job_that_gets_no_thread_has_failed(disk, no_threads):
    """It never ended, and closing the disk waited for it for ever."""
    disk.bitmaps.add("b")
    job = full(disk, bitmap="b")
    with pytest.raises(OSError, match="no thread") as e:
        job.wait(10)
    assert e.value.errno == errno.EAGAIN
    assert sorted(os.listdir(Path(disk.path).parent)) == ["disk"]
    assert not disk.snapshots
    assert disk.bitmaps["b"].enabled
    assert disk.bitmaps["b"].since is None
    disk.close()


@pytest.mark.parametrize("fleece", [None, "fleece"])
def test_what_fails_after_t0_leaves_nothing(disk, monkeypatch, fleece):
    """The snapshot stayed armed, the bitmap frozen, and the image open."""
    folder = Path(disk.path).parent
    disk.bitmaps.add("b", persistent=True)
    before, names = descriptors(), sorted(os.listdir(folder))

    def no_plan(*_):
        raise MemoryError("no memory for a plan")

    monkeypatch.setattr("cbwcore.backup.group.make_plan", no_plan)
    options = {"fleece": folder / fleece} if fleece else {}
    with pytest.raises(MemoryError):
        full(disk, bitmap="b", **options)
    monkeypatch.undo()
    assert not disk.snapshots
    assert (sorted(os.listdir(folder)), descriptors()) == (names, before)
    disk.pwrite(b"new", 5)
    assert disk.bitmaps["b"].is_dirty(0)
    result = full(disk, bitmap="b", **options).wait(10)
    assert disk.bitmaps["b"].since == result.id
    assert disk.bitmaps["b"].count() == 0


def test_a_bitmap_that_cannot_be_unmapped_is_committed_all_the_same(disk, monkeypatch):
    """The backup was there and the bitmap had begun anew; the job said AssertionError."""
    disk.bitmaps.add("b", persistent=True)

    def no_memory(bitmap):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    job = full(disk, bitmap="b", speed=1)
    disk.pwrite(b"new", SIZE - 3)
    monkeypatch.setattr(job._making.freeze.successor.__class__, "_unmap_file", no_memory)
    job.speed = 0
    result = job.wait(10)
    monkeypatch.undo()
    assert result.bitmap_error is None
    assert disk.bitmaps["b"].since == result.id
    assert list(disk.bitmaps["b"].ranges()) == [(6 * 65536, 1000)]
    disk.close()
    with cbwcore.Disk(disk.path) as again:
        assert again.bitmaps["b"].since == result.id
        assert list(again.bitmaps["b"].ranges()) == [(6 * 65536, 1000)]


def stat_fails_once(monkeypatch, path):
    """os.stat() of a path says EIO the first time."""
    stat, hit = os.stat, []

    def failing_stat(where, *args, **options):
        if not hit and not isinstance(where, int) and os.fspath(where) == os.fspath(path):
            hit.append(where)
            raise OSError(errno.EIO, os.strerror(errno.EIO), where)
        return stat(where, *args, **options)

    monkeypatch.setattr(os, "stat", failing_stat)
    return hit


def test_a_fleecing_target_that_cannot_be_looked_at_is_not_taken_for_a_new_one(disk, monkeypatch):
    """It was used, and removed in the end."""
    fleece = Path(disk.path).parent / "fleece"
    fleece.write_bytes(bytes(SIZE))
    hit = stat_fails_once(monkeypatch, fleece)
    with pytest.raises(OSError, match="Input/output"):
        full(disk, fleece=fleece).wait(10)
    assert hit
    monkeypatch.undo()
    full(disk, fleece=fleece).wait(10)
    assert fleece.exists()


def test_a_target_that_cannot_be_looked_at_may_be_the_disk(disk, monkeypatch):
    """It was written over, where overwriting was asked for."""
    hit = stat_fails_once(monkeypatch, Path(disk.path))
    content = Path(disk.path).read_bytes()
    hit.clear()
    with pytest.raises(OSError, match="Input/output"):
        disk.backup(disk.path, format="qcow2", overwrite=True).wait(10)
    monkeypatch.undo()
    assert Path(disk.path).read_bytes() == content


# ---- the bitmap file ----


def test_a_directory_that_comes_in_parts_is_whole(disk, monkeypatch):
    """It was called damaged, and no bitmap in it could be used."""
    disk.bitmaps.add("b", persistent=True)
    disk.pwrite(b"new", 5)
    disk.close()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
    with cbwcore.Disk(disk.path) as again:
        assert again.bitmaps.problem is None
        assert list(again.bitmaps["b"].ranges()) == [(0, 65536)]


# ---- images ----


@pytest.mark.parametrize("name", ["full.qcow2", "full.qcow2.cbw.json", "folder"])
def test_a_backup_that_is_durable_is_one_though_closing_it_fails(disk, monkeypatch, name):
    """It was reported as failed, and there it was."""
    content = Path(disk.path).read_bytes()
    name = Path(disk.path).parent.name if name == "folder" else name
    before = descriptors()
    hit = close_fails(monkeypatch, name)
    result = full(disk).wait(10)
    monkeypatch.undo()
    assert hit
    assert descriptors() == before
    image = Path(disk.path).parent / "full.qcow2"
    assert cbwcore.verify_backup(image).chain[0].id == result.id
    cbwcore.restore(image, image.parent / "restored")
    assert (image.parent / "restored").read_bytes() == content


@pytest.mark.parametrize("name", ["full.qcow2", "restored", "folder"])
def test_a_restored_disk_is_one_though_closing_it_fails(disk, monkeypatch, name):
    content = Path(disk.path).read_bytes()
    folder = Path(disk.path).parent
    full(disk).wait(10)
    before = descriptors()
    hit = close_fails(monkeypatch, folder.name if name == "folder" else name)
    cbwcore.restore(folder / "full.qcow2", folder / "restored")
    monkeypatch.undo()
    assert hit
    assert descriptors() == before
    assert (folder / "restored").read_bytes() == content


def test_a_partial_file_that_cannot_be_looked_at_is_not_left_open(place, monkeypatch):
    def no_answer(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = descriptors()
    monkeypatch.setattr(PartialFile, "_is_partial", no_answer)
    with pytest.raises(OSError, match="Input/output"):
        PartialFile(str(place / "image"), overwrite=False)
    monkeypatch.undo()
    assert descriptors() == before
    PartialFile(str(place / "image"), overwrite=False).discard()


def test_a_restore_without_threads_goes_on_by_itself(disk, no_threads, monkeypatch):
    content = Path(disk.path).read_bytes()
    folder = Path(disk.path).parent
    start = threading.Thread.start
    monkeypatch.undo()
    full(disk).wait(10)
    monkeypatch.setattr(threading.Thread, "start", start)
    cbwcore.restore(folder / "full.qcow2", folder / "restored")
    assert (folder / "restored").read_bytes() == content


def test_a_manifest_that_is_an_empty_pipe_is_refused(place):
    """TypeError: of nothing yet the reading of a pipe says None."""
    (place / "image").write_bytes(bytes(65536))
    os.mkfifo(place / "image.cbw.json")
    pipe = os.open(place / "image.cbw.json", os.O_RDWR)
    try:
        started = time.monotonic()
        with pytest.raises(cbwcore.StateError, match="damaged"):
            cbwcore.verify_backup(place / "image")
        assert time.monotonic() - started < 10
    finally:
        os.close(pipe)
