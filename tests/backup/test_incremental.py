"""Incremental backups: what they have, what they are refused for, and what becomes of the bitmap."""

import errno
import os
import subprocess

import pytest
from backup_support import CHUNK, ONE_AT_A_TIME, UNIT, overwrite
from engine_support import file_bytes, until
from programs_support import need

import cbwcore
from cbwcore import DirtyBitmap
from cbwcore._cbwcore import FaultPlan
from cbwcore.errors import ConfigError, StateError
from cbwcore.freeze import Freeze


def restored(image, tmp_path):
    """The bytes of a disk that is restored from an image."""
    target = tmp_path / "restored"
    cbwcore.restore(image, target, overwrite=True)
    return file_bytes(target)


@pytest.fixture
def full(make_disk, tmp_path):
    """(disk, its full backup) with a bitmap "daily" that the backup has started."""
    disk = make_disk(8 * CHUNK + 777)
    disk.backup(tmp_path / "full.qcow2", bitmap="daily").wait()
    return disk, tmp_path / "full.qcow2"


def incremental(disk, target, backing, **options):
    return disk.backup(target, sync="incremental", bitmap="daily", backing=backing, **options)


# ---- what it has ----


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_chain_of_backups(full, tmp_path, compress):
    """Each under a guest that overwrites all of the disk as soon as the job has begun; QEMU and we read them."""
    disk, backing = full
    for day in range(3):
        disk.pwrite(os.urandom(3 * UNIT), day * CHUNK + 1000)
        disk.pwrite_zeroes(day * CHUNK + 8 * UNIT, UNIT)
        disk.pwrite(b"tail", disk.size - 4)
        t0 = file_bytes(disk.path)
        image = tmp_path / f"day{day}.qcow2"
        job = incremental(disk, image, backing, compress=compress, speed=ONE_AT_A_TIME)
        before = file_bytes(disk.path)
        overwrite(disk, bytes([65 + day]))
        job.speed = 0
        result = job.wait()
        assert result.sync == "incremental"
        assert result.manifest.parent.id == cbwcore.verify_backup(backing).chain[0].id
        assert restored(image, tmp_path) == t0
        for offset in range(0, disk.size, CHUNK):  # as it was, so that the next day has little to copy
            disk.pwrite(before[offset : offset + CHUNK], offset)
        disk.bitmaps["daily"]._reset()
        backing = image
    need("qemu-img")
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", image, tmp_path / "restored"], check=True)


def test_it_copies_what_is_dirty_and_no_more(full, tmp_path):
    disk, backing = full
    disk.pwrite(b"1", 3 * UNIT + 5)
    disk.discard(40 * UNIT, UNIT)
    plan = FaultPlan()
    disk._inject(plan)
    result = incremental(disk, tmp_path / "inc.qcow2", backing).wait()
    assert {(offset // UNIT) for _, offset, _ in plan.calls("pread")} <= {3, 40}
    disk._inject(None)
    assert result.manifest.data_bytes + result.manifest.zero_bytes == 2 * UNIT
    assert restored(tmp_path / "inc.qcow2", tmp_path) == file_bytes(disk.path)


def test_nothing_was_written(full, tmp_path):
    disk, backing = full
    result = incremental(disk, tmp_path / "inc.qcow2", backing).wait()
    assert result.manifest.data_bytes == 0
    assert restored(tmp_path / "inc.qcow2", tmp_path) == file_bytes(disk.path)


@pytest.mark.parametrize("granularity", [512, 4096, 4 * UNIT])
def test_a_bitmap_of_another_granularity(make_disk, tmp_path, granularity):
    disk = make_disk(3 * CHUNK + 5)
    disk.bitmaps.add("daily", granularity=granularity)
    disk.backup(tmp_path / "full.qcow2", bitmap="daily").wait()
    disk.pwrite(b"1", 5 * UNIT - 1)
    disk.pwrite(b"2", disk.size - 1)
    incremental(disk, tmp_path / "inc.qcow2", tmp_path / "full.qcow2").wait()
    assert restored(tmp_path / "inc.qcow2", tmp_path) == file_bytes(disk.path)


def test_guests_writes_elsewhere_are_not_preserved(full, tmp_path):
    """The snapshot covers what the job copies."""
    disk, backing = full
    for offset in (0, 9 * UNIT):
        disk.pwrite(b"1", offset)
    job = incremental(disk, tmp_path / "inc.qcow2", backing, speed=ONE_AT_A_TIME)
    until(lambda: job.offset == UNIT, "the first span")
    overwrite(disk)
    assert job.snapshot.stats().cbw_bytes == UNIT
    job.speed = 0
    job.wait()


# ---- what it is refused for ----


def new_identity(disk, backing, tmp_path):
    overwrite(disk)
    other = tmp_path / "other.qcow2"
    disk.backup(other).wait()  # a full backup that has nothing to do with the bitmap
    return other


def missing_manifest(disk, backing, tmp_path):
    os.unlink(f"{backing}.cbw.json")
    return backing


def other_size(disk, backing, tmp_path):
    with open(tmp_path / "small", "wb") as f:
        f.truncate(UNIT)
    with cbwcore.Disk(tmp_path / "small") as small:
        small.backup(tmp_path / "small.qcow2").wait()
    return tmp_path / "small.qcow2"


def cleared(disk, backing, tmp_path):
    disk.bitmaps["daily"].clear()
    return backing


def not_recording_for_a_while(disk, backing, tmp_path):
    disk.bitmaps["daily"].disable()
    disk.bitmaps["daily"].enable()
    return backing


def removed(disk, backing, tmp_path):
    disk.bitmaps.remove("daily")
    return backing


def made_anew(disk, backing, tmp_path):
    disk.bitmaps.remove("daily")
    disk.bitmaps.add("daily")
    return backing


def an_older_one(disk, backing, tmp_path):
    """The bitmap has recorded since the second."""
    disk.pwrite(b"1", 0)
    incremental(disk, tmp_path / "second.qcow2", backing).wait()
    return backing


def inconsistent(disk, backing, tmp_path):
    disk.bitmaps["daily"]._spoil("the test says so")
    return backing


REASONS = [
    (new_identity, r"bitmap 'daily' has recorded since backup \w{32}, and \S*other.qcow2 is \w{32}"),
    (missing_manifest, "full.qcow2 is no backup to build on: .*manifest .* is missing"),
    (other_size, "small.qcow2 is of 65536 bytes, the disk of 8389385"),
    (cleared, "bitmap 'daily' has recorded since no backup"),
    (not_recording_for_a_while, "bitmap 'daily' has recorded since no backup"),
    (removed, "it has no bitmap 'daily'"),
    (made_anew, "bitmap 'daily' has recorded since no backup"),
    (an_older_one, r"bitmap 'daily' has recorded since backup \w{32}, and \S*full.qcow2 is \w{32}"),
    (inconsistent, "bitmap 'daily' is inconsistent: the test says so"),
]


@pytest.mark.parametrize(("spoil", "reason"), REASONS, ids=[spoil.__name__ for spoil, _ in REASONS])
def test_refused_with_the_reason_or_done_in_full(full, tmp_path, spoil, reason):
    disk, backing = full
    backing = spoil(disk, backing, tmp_path)
    names = set(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=f"incremental backup of .* is refused: .*{reason}"):
        incremental(disk, tmp_path / "inc.qcow2", backing)
    assert set(os.listdir(tmp_path)) == names
    assert disk.snapshots == ()
    result = incremental(disk, tmp_path / "inc.qcow2", backing, fallback="full").wait()
    assert result.sync == "full"
    assert result.manifest.sync == "full"
    assert result.manifest.parent is None
    assert restored(tmp_path / "inc.qcow2", tmp_path) == file_bytes(disk.path)
    disk.pwrite(b"9", 0)
    again = incremental(disk, tmp_path / "next.qcow2", tmp_path / "inc.qcow2").wait()
    assert again.sync == "incremental"
    assert restored(tmp_path / "next.qcow2", tmp_path) == file_bytes(disk.path)


def test_a_damaged_bitmap_file(make_disk, tmp_path):
    disk = make_disk()
    disk.backup(tmp_path / "full.qcow2", bitmap="daily").wait()
    assert disk.bitmaps["daily"].persistent
    disk.close()
    with open(disk.bitmaps.path, "r+b") as f:
        f.write(bytes(2 << 20))
    with cbwcore.Disk(disk.path) as disk:
        with pytest.raises(ConfigError, match=r"the bitmaps of .* cannot be used"):
            incremental(disk, tmp_path / "inc.qcow2", tmp_path / "full.qcow2")
        result = incremental(disk, tmp_path / "inc.qcow2", tmp_path / "full.qcow2", fallback="full").wait()
        assert "cannot be used" in result.reason
        assert disk.bitmaps["daily"].persistent


def test_a_group_that_cannot_start_replaces_no_bitmap(full, make_disk, tmp_path):
    """Not even one that cannot be used, of the disk before the one that fails."""
    disk, _ = full
    disk.bitmaps["daily"]._spoil("the test says so")
    (tmp_path / "there").write_bytes(b"there")
    with pytest.raises(ConfigError, match="there already"):
        cbwcore.backup_group([(disk, tmp_path / "new"), (make_disk(name="second"), tmp_path / "there")], bitmap="daily")
    assert disk.bitmaps["daily"].inconsistent == "the test says so"


def test_a_bitmap_goes_on_in_the_next_process(make_disk, tmp_path):
    disk = make_disk()
    disk.backup(tmp_path / "full.qcow2", bitmap="daily").wait()
    disk.pwrite(b"1", UNIT)
    disk.close()
    with cbwcore.Disk(disk.path) as disk:
        disk.pwrite(b"2", 7 * UNIT)
        assert incremental(disk, tmp_path / "inc.qcow2", tmp_path / "full.qcow2").wait().manifest.data_bytes == 2 * UNIT
    assert restored(tmp_path / "inc.qcow2", tmp_path) == file_bytes(disk.path)


def test_two_jobs_do_not_share_a_bitmap(full, tmp_path):
    disk, backing = full
    disk.pwrite(b"1", 0)
    job = incremental(disk, tmp_path / "inc.qcow2", backing, speed=ONE_AT_A_TIME)
    for options in ({}, {"fallback": "full"}):
        with pytest.raises(ConfigError, match="'daily' is in use by a job"):
            incremental(disk, tmp_path / "other.qcow2", backing, **options)
    with pytest.raises(ConfigError, match="'daily' is in use by a job"):
        disk.backup(tmp_path / "other.qcow2", bitmap="daily")
    job.speed = 0
    job.wait()
    assert not (tmp_path / "other.qcow2.partial").exists()


def test_an_image_whose_bitmap_was_not_told_can_be_built_on(full, tmp_path, monkeypatch):
    """As where the process died between the two: the bitmap has what it had, and what was written since."""
    disk, backing = full
    disk.pwrite(b"1", UNIT)

    def fail(self, since):
        raise OSError(errno.ENOSPC, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(Freeze, "commit", fail)
        result = incremental(disk, tmp_path / "inc.qcow2", backing).wait()
    assert "injected" in result.bitmap_error
    disk.pwrite(b"2", 2 * UNIT)
    assert disk.bitmaps["daily"].count() == 2 * UNIT
    assert restored(tmp_path / "inc.qcow2", tmp_path) != file_bytes(disk.path)
    for image, parent in (("on-it.qcow2", "inc.qcow2"),):
        assert incremental(disk, tmp_path / image, tmp_path / parent).wait().bitmap_error is None
        assert restored(tmp_path / image, tmp_path) == file_bytes(disk.path)


# ---- bitmap modes ----


def start_by_bitmap(disk, tmp_path, backing, mode, **options):
    return disk.backup(
        tmp_path / "part.qcow2", sync="bitmap", bitmap="daily", bitmap_mode=mode, backing=backing, workers=1, **options
    )


@pytest.mark.parametrize(("mode", "left"), [("on-success", [9]), ("never", [0, 20, 9]), ("always", [9])])
def test_the_bitmap_after_success(full, tmp_path, mode, left):
    disk, backing = full
    for unit in (0, 20):
        disk.pwrite(b"1", unit * UNIT)
    since = disk.bitmaps["daily"].since
    job = start_by_bitmap(disk, tmp_path, backing, mode, speed=ONE_AT_A_TIME)
    disk.pwrite(b"1", 9 * UNIT)
    job.speed = 0
    job.wait()
    assert units(disk.bitmaps["daily"]) == sorted(left)
    assert disk.bitmaps["daily"].since == (since if mode == "never" else job.id)


@pytest.mark.parametrize(
    ("mode", "left", "keeps"),
    [("on-success", [0, 9, 20], False), ("never", [0, 9, 20], False), ("always", [9, 20], True)],
)
@pytest.mark.parametrize("end", ["cancel", "error"])
def test_the_bitmap_after_a_failure(full, tmp_path, mode, left, keeps, end):
    """Of "always" what was copied is gone from it: so the partial image is kept, and no incremental can rely on it."""
    disk, backing = full
    for unit in (0, 20):
        disk.pwrite(b"1", unit * UNIT)
    plan = FaultPlan()
    job = start_by_bitmap(disk, tmp_path, backing, mode, speed=ONE_AT_A_TIME)
    until(lambda: job.offset == UNIT, "the first span")
    disk.pwrite(b"1", 9 * UNIT)
    if end == "cancel":
        job.cancel()
    else:
        disk._inject(plan)
        plan.error("pread")
        job.speed = 0
    with pytest.raises((cbwcore.JobCancelledError, OSError)):
        job.wait(20)
    disk._inject(None)
    assert units(disk.bitmaps["daily"]) == left
    assert not (tmp_path / "part.qcow2").exists()
    assert (tmp_path / "part.qcow2.partial").exists() == keeps
    if keeps:
        with pytest.raises(ConfigError, match="recorded since no backup"):
            incremental(disk, tmp_path / "inc.qcow2", backing)
    with pytest.raises(StateError):
        cbwcore.verify_backup(tmp_path / "part.qcow2.partial")


def units(bitmap: DirtyBitmap):
    return [unit for offset, length in bitmap.ranges() for unit in range(offset // UNIT, (offset + length) // UNIT)]
