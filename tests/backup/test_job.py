"""Backup jobs: the image is the disk of T0, whatever the guest does; control; errors; the end."""

import errno
import os
import threading
import time

import pytest
from backup_support import CHUNK, ONE_AT_A_TIME, UNIT, overwrite
from engine_support import file_bytes, until

import cbwcore
import cbwcore.images.raw_output
from cbwcore import BackupOptions, JobStatus
from cbwcore._cbwcore import FaultPlan
from cbwcore.errors import ConfigError, JobCancelledError, SnapshotBrokenError, StateError

SIZES = [0, 1, 511, 4096, UNIT - 1, UNIT, UNIT + 1, CHUNK + 3 * UNIT + 5, 3 * CHUNK]


def events_of(job):
    return [(e.event, str(e.status)) for e in job.events()]


# ---- what is copied ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk_size", [UNIT, CHUNK])
def test_a_full_backup_is_the_disk(make_disk, tmp_path, size, chunk_size):
    disk = make_disk(size)
    result = disk.backup(tmp_path / "image", chunk_size=chunk_size).wait()
    assert file_bytes(tmp_path / "image") == file_bytes(disk.path)
    assert result.sync == "full"
    assert result.manifest.size == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_full_qcow2_backup_is_the_disk(make_disk, tmp_path, size, compress):
    disk = make_disk(size)
    disk.backup(tmp_path / "image.qcow2", compress=compress).wait()
    cbwcore.restore(tmp_path / "image.qcow2", tmp_path / "restored")
    assert file_bytes(tmp_path / "restored") == file_bytes(disk.path)


@pytest.mark.parametrize("name", ["image", "image.qcow2"])
def test_a_sparse_disk_of_many_tebibytes(make_disk, tmp_path, name):
    """It takes the time of what is stored."""
    size = 15 << 40  # ext4 has no file of 16
    disk = make_disk(0)
    disk.close()
    os.truncate(disk.path, size)
    with cbwcore.Disk(disk.path) as disk:
        spots = [0, 7 << 40, (9 << 40) + 12345, size - 5]
        for offset in spots:
            disk.pwrite(b"here!", offset)
        result = disk.backup(tmp_path / name, bitmap="daily").wait(60)
        assert result.manifest.data_bytes == len(spots) * UNIT
        disk.pwrite(b"there", 3 << 40)
        if name.endswith("qcow2"):
            inc = {"sync": "incremental", "bitmap": "daily", "backing": tmp_path / name}
            assert disk.backup(tmp_path / "inc.qcow2", **inc).wait(60).manifest.data_bytes == UNIT
            cbwcore.restore(tmp_path / "inc.qcow2", tmp_path / "restored")
        else:
            cbwcore.restore(tmp_path / name, tmp_path / "restored")
    for offset in spots:
        assert file_bytes(tmp_path / "restored", offset, 5) == b"here!"
    assert (file_bytes(tmp_path / "restored", 3 << 40, 5) == b"there") == name.endswith("qcow2")
    assert (tmp_path / "restored").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("direct", [False, True])
def test_a_full_backup_is_the_disk_of_t0(make_disk, tmp_path, workers, direct):
    """The guest overwrites all of it as soon as the job has begun."""
    disk = make_disk(direct=direct)
    before = file_bytes(disk.path)
    job = disk.backup(tmp_path / "image", workers=workers, speed=ONE_AT_A_TIME)
    overwrite(disk)
    job.speed = 0
    result = job.wait()
    assert file_bytes(tmp_path / "image") == before
    assert file_bytes(disk.path) == b"x" * disk.size
    assert result.cbw_bytes > 0


def test_holes_of_the_disk_are_holes_of_the_image(make_disk, tmp_path):
    disk = make_disk(64 * CHUNK)
    disk.pwrite_zeroes(0, disk.size)
    disk.pwrite(b"1", 33 * CHUNK)
    disk.pwrite(bytes(CHUNK), 5 * CHUNK)  # zeroes that are stored
    result = disk.backup(tmp_path / "image").wait()
    assert (tmp_path / "image").stat().st_blocks * 512 <= 2 * UNIT
    assert result.manifest.data_bytes == UNIT


def test_what_is_read_is_not_preserved_any_more(make_disk, tmp_path):
    """A guest's write behind the job copies nothing; one before it does."""
    disk = make_disk()
    disk.pwrite(b"1" * disk.size, 0)
    job = disk.backup(tmp_path / "image", workers=1, speed=ONE_AT_A_TIME)
    until(lambda: job.offset == CHUNK, "the first span")
    disk.pwrite(b"x" * CHUNK, 0)
    assert job.snapshot.stats().cbw_copies == 0
    disk.pwrite(b"x", disk.size - 1)
    assert job.snapshot.stats().cbw_bytes == UNIT
    job.speed = 0
    job.wait()
    assert file_bytes(tmp_path / "image") == b"1" * disk.size


def test_the_space_for_old_data_is_given_back_behind_the_job(make_disk, tmp_path):
    disk = make_disk()
    disk.pwrite(b"1" * disk.size, 0)
    job = disk.backup(tmp_path / "image", workers=1, speed=ONE_AT_A_TIME, fleece=tmp_path / "fleece")
    until(lambda: job.offset == CHUNK, "the first span")
    overwrite(disk)
    held = job.snapshot.stats().target_bytes
    assert held == disk.size - CHUNK
    job.speed = CHUNK * 50
    until(lambda: job.offset >= 4 * CHUNK, "half of it")
    assert job.snapshot.stats().target_bytes <= disk.size - 4 * CHUNK + CHUNK
    assert (tmp_path / "fleece").stat().st_blocks * 512 <= disk.size - 3 * CHUNK
    job.speed = 0
    result = job.wait()
    assert result.fleece_peak == held
    assert not (tmp_path / "fleece").exists()


def test_a_fleecing_target_that_was_there_stays(make_disk, tmp_path):
    disk = make_disk()
    (tmp_path / "fleece").write_bytes(bytes(disk.size))
    disk.backup(tmp_path / "image", fleece=tmp_path / "fleece").wait()
    assert (tmp_path / "fleece").exists()


def test_a_cluster_larger_than_the_chunk_is_given_up_whole(make_disk, tmp_path):
    disk = make_disk()
    disk.pwrite(b"1" * disk.size, 0)
    options = {"cluster_size": 2 * CHUNK, "chunk_size": UNIT, "workers": 1, "speed": ONE_AT_A_TIME}
    job = disk.backup(tmp_path / "image", **options)
    until(lambda: job.offset == 2 * CHUNK, "the first span")
    disk.pwrite(b"x", 0)
    assert job.snapshot.stats().cbw_copies == 0
    job.cancel()


def test_one_t0_for_several_disks(make_disk, tmp_path):
    """A guest writes a number to the one disk and then to the other: the images differ by one at most."""
    first, second = make_disk(name="first"), make_disk(name="second")
    stop = threading.Event()
    for disk in (first, second):
        disk.pwrite(bytes(8), 0)

    def guest():
        for i in range(1 << 30):
            if stop.is_set():
                return
            for disk in (first, second):
                disk.pwrite(i.to_bytes(8, "little"), 0)

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        for _ in range(20):
            jobs = cbwcore.backup_group([(first, tmp_path / "a"), (second, tmp_path / "b")], overwrite=True)
            for job in jobs:
                job.wait()
            a, b = (int.from_bytes(file_bytes(tmp_path / name, 0, 8), "little") for name in "ab")
            assert a - b in (0, 1)
    finally:
        stop.set()
        thread.join()


# ---- control ----


def test_pause_and_resume(make_disk, tmp_path):
    disk = make_disk()
    plan = FaultPlan()
    disk._inject(plan)
    plan.stall("pread")
    job = disk.backup(tmp_path / "image", workers=2)
    plan.wait_stalled(2)
    job.pause()
    assert job.status == JobStatus.RUNNING  # until the spans under way are done
    plan.release()
    until(lambda: job.status == JobStatus.PAUSED, "paused")
    plan.forget_calls()
    done = job.offset
    time.sleep(0.05)
    assert plan.calls("pread") == []
    assert job.offset == done < disk.size
    job.pause()
    job.resume()
    job.wait()
    assert file_bytes(tmp_path / "image") == file_bytes(disk.path)
    told = [status for event, status in events_of(job) if event == "JOB_STATUS_CHANGE"]
    assert told == ["running", "paused", "running", "concluded"]
    disk._inject(None)


def test_a_paused_job_can_be_cancelled(make_disk, tmp_path, no_backup):
    disk = make_disk()
    job = disk.backup(tmp_path / "image", speed=ONE_AT_A_TIME)
    job.pause()
    job.cancel()
    job.cancel()
    with pytest.raises(JobCancelledError, match="was cancelled"):
        job.wait(20)
    no_backup("image")
    assert events_of(job)[-1] == ("BLOCK_JOB_CANCELLED", "concluded")
    assert disk.snapshots == ()
    assert "concluded" in repr(job)


def test_speed_limits_the_rate(make_disk, tmp_path):
    disk = make_disk()
    disk.pwrite(b"1" * disk.size, 0)
    began = time.monotonic()
    disk.backup(tmp_path / "image", speed=16 * CHUNK, workers=4).wait()
    assert time.monotonic() - began >= 7 / 16 * 0.9
    with pytest.raises(ConfigError, match="speed -1 is outside"):
        disk.backup(tmp_path / "other", speed=-1)
    job = disk.backup(tmp_path / "other", speed=ONE_AT_A_TIME)
    with pytest.raises(ConfigError, match="speed -1 is outside"):
        job.speed = -1
    assert job.speed == ONE_AT_A_TIME
    job.speed = 0
    job.wait(20)


def test_wait_may_end_before_the_job(make_disk, tmp_path):
    disk = make_disk()
    job = disk.backup(tmp_path / "image", speed=ONE_AT_A_TIME)
    with pytest.raises(TimeoutError):
        job.wait(0.01)
    seen = [e.event for e in job.events(timeout=0.01)]
    assert seen == ["JOB_STATUS_CHANGE"]
    job.cancel()


def test_progress_is_told(make_disk, tmp_path, caplog):
    disk = make_disk()
    seen = []

    def progress(job):
        seen.append((job.offset, job.len))
        raise RuntimeError("the callback's own")

    job = disk.backup(tmp_path / "image", speed=32 * CHUNK, progress=progress)
    job.wait()
    assert len(seen) >= 2
    assert seen == sorted(seen)
    assert seen[-1] == (disk.size, disk.size)
    assert "the callback's own" in caplog.text


def test_a_callback_may_close_the_disk(make_disk, tmp_path, no_backup):
    disk = make_disk()
    job = disk.backup(tmp_path / "image", speed=32 * CHUNK, progress=lambda job: disk.close())
    with pytest.raises(JobCancelledError):
        job.wait(20)
    no_backup("image")


def test_closing_the_disk_cancels_its_jobs(make_disk, tmp_path, no_backup):
    disk = make_disk()
    jobs = [disk.backup(tmp_path / f"image{i}", speed=ONE_AT_A_TIME) for i in range(3)]
    disk.close()
    for job in jobs:
        assert job.status == JobStatus.CONCLUDED
        with pytest.raises(JobCancelledError):
            job.wait()
    no_backup("image")


# ---- errors ----


def test_a_read_error_fails_the_job(make_disk, tmp_path, no_backup):
    disk = make_disk()
    bitmap = disk.bitmaps.add("daily")
    disk.pwrite(b"1", UNIT)
    plan = FaultPlan()
    disk._inject(plan)
    plan.error("pread", errno.EIO, start=4 * CHUNK)
    job = disk.backup(tmp_path / "image", bitmap="daily")
    with pytest.raises(OSError, match="Input/output error") as e:
        job.wait()
    assert e.value.errno == errno.EIO
    no_backup("image")
    assert list(bitmap.ranges()) == [(UNIT, UNIT)]
    assert not bitmap.frozen
    assert bitmap.enabled
    assert [event for event, _ in events_of(job)[-3:]] == [
        "JOB_STATUS_CHANGE",
        "JOB_STATUS_CHANGE",
        "BLOCK_JOB_COMPLETED",
    ]
    failures = [e for e in job.events() if e.event == "BLOCK_JOB_ERROR"]
    assert (failures[0].operation, failures[0].action) == ("read", "report")
    disk._inject(None)
    disk.backup(tmp_path / "image").wait()


def test_an_ignored_read_error_is_tried_again(make_disk, tmp_path):
    disk = make_disk()
    plan = FaultPlan()
    disk._inject(plan)
    plan.error("pread", errno.EIO, start=4 * CHUNK, end=4 * CHUNK + 1, times=3)
    result = disk.backup(tmp_path / "image", on_source_error="ignore").wait()
    assert result.retries == 3
    disk._inject(None)
    assert file_bytes(tmp_path / "image") == file_bytes(disk.path)


@pytest.mark.parametrize("operation", ["seek", "pread"])
def test_a_read_error_stops_the_job(make_disk, tmp_path, operation):
    """Of the block status, too, by which the job plans."""
    disk = make_disk()
    plan = FaultPlan()
    disk._inject(plan)
    plan.error(operation, errno.EIO, start=4 * CHUNK, times=1)
    job = disk.backup(tmp_path / "image", on_source_error="stop")
    until(lambda: job.status == JobStatus.PAUSED, "stopped")
    assert any(e.event == "BLOCK_JOB_ERROR" and e.action == "stop" for e in job.events(timeout=0.1))
    job.resume()
    assert job.wait(20).retries == 1
    disk._inject(None)
    assert file_bytes(tmp_path / "image") == file_bytes(disk.path)


@pytest.fixture
def failing_target(monkeypatch):
    """Writes of raw images fail with the errno that is set here, if any."""
    real, state = cbwcore.images.raw_output.write_all, {"errno": 0, "left": 1 << 30}

    def write_all(fd, view, offset):
        if state["errno"] and state["left"]:
            state["left"] -= 1
            raise OSError(state["errno"], "injected")
        real(fd, view, offset)

    monkeypatch.setattr(cbwcore.images.raw_output, "write_all", write_all)
    return state


def test_a_target_that_hangs_holds_no_guest_up(make_disk, tmp_path, monkeypatch):
    """Nor does a paused job: guests write all of the disk meanwhile, the spans that are under way included."""
    disk = make_disk()
    disk.pwrite(b"1" * disk.size, 0)
    real, goes_on, hanging = cbwcore.images.raw_output.write_all, threading.Event(), threading.Semaphore(0)

    def write_all(fd, view, offset):
        hanging.release()
        assert goes_on.wait(60)
        real(fd, view, offset)

    monkeypatch.setattr(cbwcore.images.raw_output, "write_all", write_all)
    job = disk.backup(tmp_path / "image", workers=2)
    for _ in range(2):
        assert hanging.acquire(timeout=20)
    overwrite(disk)
    assert file_bytes(disk.path) == b"x" * disk.size
    goes_on.set()
    job.wait(60)
    assert file_bytes(tmp_path / "image") == b"1" * disk.size


@pytest.mark.parametrize(("policy", "code"), [("report", errno.EIO), ("enospc", errno.EIO), ("report", errno.ENOSPC)])
def test_a_write_error_fails_the_job(make_disk, tmp_path, no_backup, failing_target, policy, code):
    disk = make_disk()
    failing_target["errno"] = code
    with pytest.raises(OSError, match="injected"):
        disk.backup(tmp_path / "image", on_target_error=policy).wait()
    no_backup("image")


@pytest.mark.parametrize(("policy", "code"), [("stop", errno.EIO), ("enospc", errno.ENOSPC)])
def test_a_write_error_stops_the_job(make_disk, tmp_path, failing_target, policy, code):
    disk = make_disk()
    before = file_bytes(disk.path)
    failing_target["errno"] = code
    job = disk.backup(tmp_path / "image", on_target_error=policy)
    until(lambda: job.status == JobStatus.PAUSED, "stopped")
    overwrite(disk)
    job.resume()
    until(lambda: job.status == JobStatus.PAUSED, "stopped again")
    failing_target["errno"] = 0
    job.resume()
    job.wait(20)
    assert file_bytes(tmp_path / "image") == before


def test_an_ignored_write_error_is_tried_again(make_disk, tmp_path, failing_target):
    disk = make_disk()
    failing_target.update(errno=errno.EIO, left=5)
    assert disk.backup(tmp_path / "image", on_target_error="ignore").wait().retries == 5
    assert file_bytes(tmp_path / "image") == file_bytes(disk.path)


def test_a_job_that_ignores_a_lasting_error_can_be_cancelled(make_disk, tmp_path, no_backup, failing_target):
    disk = make_disk()
    failing_target["errno"] = errno.EIO
    job = disk.backup(tmp_path / "image", on_target_error="ignore")
    until(lambda: sum(e.event == "BLOCK_JOB_ERROR" for e in job.events(timeout=0)) > 3, "errors")
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.wait(20)
    no_backup("image")


def test_a_broken_snapshot_fails_the_job_whatever_the_policy(make_disk, tmp_path, no_backup):
    disk = make_disk()
    bitmap = disk.bitmaps.add("daily")
    job = disk.backup(
        tmp_path / "image",
        bitmap="daily",
        speed=ONE_AT_A_TIME,
        on_source_error="ignore",
        on_cbw_error="break-snapshot",
        fleece_limit=UNIT,
    )
    overwrite(disk)
    job.speed = 0
    with pytest.raises(SnapshotBrokenError):
        job.wait(20)
    no_backup("image")
    assert bitmap.count() == disk.size
    assert file_bytes(disk.path) == b"x" * disk.size


def test_a_failed_manifest_fails_the_job(make_disk, tmp_path, no_backup, monkeypatch):
    disk = make_disk()
    bitmap = disk.bitmaps.add("daily")

    def fail(self, manifest):
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(cbwcore.images.output.Output, "_write_manifest", fail)
    disk.pwrite(b"1", 0)
    with pytest.raises(OSError, match="injected"):
        disk.backup(tmp_path / "image", bitmap="daily").wait()
    no_backup("image")
    assert bitmap.count() == UNIT


@pytest.mark.parametrize("name", ["image", "image.qcow2"])
def test_verify_reads_the_image_back_before_it_counts(make_disk, tmp_path, monkeypatch, name):
    """A byte that was stored wrong: the job fails, and what the image was to replace is still there."""
    disk = make_disk()
    disk.backup(tmp_path / name, verify=True).wait()
    before = file_bytes(tmp_path / name)
    real = os.pwritev

    def spoiled(fd, views, offset, *flags):
        return real(fd, [bytes([views[0][0] ^ 1]) + bytes(views[0][1:]), *views[1:]], offset, *flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", spoiled)
        patch.setattr(os, "pwrite", lambda fd, view, offset: spoiled(fd, [view], offset))
        job = disk.backup(tmp_path / name, verify=True, overwrite=True)
        with pytest.raises(StateError):
            job.wait()
    assert file_bytes(tmp_path / name) == before
    assert not (tmp_path / f"{name}.partial").exists()


# ---- bitmaps ----


def test_a_full_backup_starts_a_bitmap(make_disk, tmp_path):
    disk = make_disk()
    job = disk.backup(tmp_path / "image", bitmap="daily", speed=ONE_AT_A_TIME)
    assert job.bitmap is disk.bitmaps["daily"]
    assert job.bitmap.frozen
    disk.pwrite(b"1", 5 * UNIT)
    job.speed = 0
    result = job.wait()
    bitmap = disk.bitmaps["daily"]
    assert list(bitmap.ranges()) == [(5 * UNIT, UNIT)]
    assert bitmap.since == result.id == job.id == result.manifest.id


def test_a_bitmap_that_a_failed_start_made_is_gone(make_disk, tmp_path):
    disk = make_disk()
    (tmp_path / "image").write_bytes(b"there")
    with pytest.raises(ConfigError, match="is there already"):
        disk.backup(tmp_path / "image", bitmap="daily")
    assert dict(disk.bitmaps) == {}
    assert disk.snapshots == ()
    assert file_bytes(tmp_path / "image") == b"there"


# ---- sync none ----


def test_fleecing_holds_the_snapshot_for_others(make_disk, tmp_path):
    disk = make_disk()
    before = file_bytes(disk.path)
    disk.bitmaps.add("daily")
    disk.pwrite(before[:1], 0)
    job = disk.backup(tmp_path / "fleece", sync="none", bitmap="daily")
    overwrite(disk)
    assert list(job.bitmap.ranges()) == [(0, UNIT)]
    assert job.snapshot.pread(disk.size, 0) == before
    result = job.complete()
    assert result.manifest is None
    assert disk.bitmaps["daily"].count() == disk.size
    assert disk.bitmaps["daily"].since == job.id
    assert events_of(job)[-1] == ("BLOCK_JOB_COMPLETED", "concluded")
    with pytest.raises(ConfigError, match="cannot be completed"):
        job.complete()


def test_fleecing_that_is_given_up_loses_nothing(make_disk, tmp_path):
    disk = make_disk()
    disk.bitmaps.add("daily")
    disk.pwrite(b"1", 0)
    job = disk.backup(None, sync="none", bitmap="daily")
    disk.pwrite(b"2", UNIT)
    job.cancel()
    with pytest.raises(JobCancelledError):
        job.wait(20)
    assert list(disk.bitmaps["daily"].ranges()) == [(0, 2 * UNIT)]
    assert disk.bitmaps["daily"].since is None


def test_fleecing_from_a_broken_snapshot_is_no_success(make_disk, tmp_path):
    disk = make_disk()
    bitmap = disk.bitmaps.add("daily")
    disk.pwrite(b"1", 0)
    job = disk.backup(None, sync="none", bitmap="daily", on_cbw_error="break-snapshot", fleece_limit=UNIT)
    overwrite(disk)
    with pytest.raises(SnapshotBrokenError):
        job.complete()
    assert bitmap.count() == disk.size
    assert bitmap.since is None


def test_fleecing_that_is_cancelled_before_it_has_started_stays_so(make_disk, monkeypatch):
    """As by a thread that closes the disk at that moment."""
    real = cbwcore.BackupJob.start

    def start(job):
        job.cancel()
        real(job)

    monkeypatch.setattr(cbwcore.BackupJob, "start", start)
    job = make_disk().backup(None, sync="none")
    assert job.status == JobStatus.CONCLUDED
    with pytest.raises(JobCancelledError):
        job.wait(20)


def test_only_fleecing_is_completed_by_hand(make_disk, tmp_path):
    disk = make_disk()
    job = disk.backup(tmp_path / "image", speed=ONE_AT_A_TIME)
    with pytest.raises(ConfigError, match="full backup, running"):
        job.complete()
    job.cancel()


# ---- what is refused ----


def test_the_image_is_neither_the_disk_nor_the_fleecing_target(make_disk, tmp_path):
    disk = make_disk()
    (tmp_path / "link").hardlink_to(disk.path)
    for target in (disk.path, tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"itself|there already"):
            disk.backup(target, overwrite=True)
    with pytest.raises(ConfigError, match="fleecing target, too"):
        disk.backup(tmp_path / "image", fleece=tmp_path / "image")
    (tmp_path / "fleece").write_bytes(bytes(disk.size))
    (tmp_path / "other").hardlink_to(tmp_path / "fleece")
    with pytest.raises(ConfigError, match=r"itself"):
        disk.backup(tmp_path / "other", fleece=tmp_path / "fleece", overwrite=True)


def test_a_group_starts_as_a_whole_or_not_at_all(make_disk, tmp_path, no_backup):
    first, second = make_disk(name="first"), make_disk(name="second")
    (tmp_path / "taken").write_bytes(b"there")
    with pytest.raises(ConfigError, match="there already"):
        cbwcore.backup_group([(first, tmp_path / "image"), (second, tmp_path / "taken")], bitmap="daily")
    no_backup("image")
    assert dict(first.bitmaps) == {}
    assert first.snapshots == ()
    with pytest.raises(ConfigError, match="hold all options"):
        cbwcore.backup_group([(first, BackupOptions(target=tmp_path / "image"))], speed=1)
    second.close()
    with pytest.raises(ValueError, match="closed"):
        cbwcore.backup_group([(first, tmp_path / "image"), (second, tmp_path / "other")])
    no_backup("image")
