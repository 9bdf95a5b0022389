"""Storage fails under the bitmap file; jobs that end, and that do not."""

import errno
import os

import pytest
from bitmap_support import (
    SIZE,
    SLOT,
    UNIT,
    assert_all_there,
    die_at,
    directories,
    entries,
    freeze,
    granules,
    killed,
    sidecar,
)

import cbwcore
from cbwcore import bitmap_file
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError

# ---- storage fails ----


def failing(monkeypatch, name, module=bitmap_file, code=errno.EIO, count=1000):
    """``count`` calls of it fail."""
    real = getattr(module, name)
    left = [count]

    def fail(*args, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    monkeypatch.setattr(module, name, fail)


def test_no_space_for_a_bitmap(place, monkeypatch):
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    with cbwcore.Disk(path) as disk:
        with monkeypatch.context() as patch:
            failing(patch, "posix_fallocate", os, errno.ENOSPC)
            with pytest.raises(OSError, match="No space left") as caught:
                disk.bitmaps.add("daily", persistent=True)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.filename == sidecar(path)
        assert os.listdir(place) == ["disk"]
        with monkeypatch.context() as patch:
            real = os.posix_fallocate
            patch.setattr(os, "posix_fallocate", lambda fd, at, n: real(fd, at, n) if at == 0 else no_space())
            with pytest.raises(OSError, match="No space left on device: 4096 bytes for the bits of bitmap 'daily'"):
                disk.bitmaps.add("daily", persistent=True)
        assert os.listdir(place) == ["disk"]
        assert len(disk.bitmaps) == 0
        disk.bitmaps.add("daily", persistent=True)
        size = os.stat(sidecar(path)).st_size
        with monkeypatch.context() as patch:
            failing(patch, "posix_fallocate", os, errno.ENOSPC)
            with pytest.raises(OSError, match="bits of bitmap 'second'"):
                disk.bitmaps.add("second", persistent=True)
            with pytest.raises(OSError, match="bits of bitmap 'daily'"):
                freeze(disk, "daily")
        assert not disk.bitmaps["daily"].frozen
        assert disk.stats().snapshots == 0
        assert os.stat(sidecar(path)).st_size == size
        assert disk.bitmaps.problem is None
        disk.pwrite(b"x", 0)
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {0}


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["write_all", "sync"])
@pytest.mark.parametrize("change", ["enable", "disable", "clear", "since", "add", "remove", "freeze"])
def test_a_directory_that_cannot_be_written(path, monkeypatch, change, what):
    """All is as it was, bits are recorded on, and the next process finds them."""

    def life():
        disk = cbwcore.Disk(path)
        daily, odd = disk.bitmaps["daily"], disk.bitmaps["ödd"]
        calls = {
            "enable": odd.enable,
            "disable": daily.disable,
            "clear": daily.clear,
            "since": lambda: setattr(daily, "since", "x"),
            "add": lambda: disk.bitmaps.add("new", persistent=True),
            "remove": lambda: disk.bitmaps.remove("daily"),
            "freeze": lambda: freeze(disk, "daily"),
        }
        with monkeypatch.context() as patch:
            failing(patch, what, count=1)
            with pytest.raises(OSError, match="Input/output error") as caught:
                calls[change]()
            assert caught.value.filename == sidecar(path)
        if not (
            what == "sync" and change in ("add", "freeze")
        ):  # there it is the area's that fails: nothing is lost by it
            assert disk.bitmaps.problem.endswith("is not written any more: Input/output error")
            with pytest.raises(StateError, match="not written any more"):
                calls[change]()
        assert set(disk.bitmaps) == {"daily", "ödd"}
        assert (daily.enabled, daily.since, odd.enabled) == (True, "monday", False)
        assert not daily.frozen
        disk.pwrite(b"x", 7 * UNIT)
        assert granules(daily) == {2, 3, 7}
        return disk

    killed(life)
    for end in (life, None):
        with cbwcore.Disk(path) as disk:
            daily, odd = disk.bitmaps["daily"], disk.bitmaps["ödd"]
            assert (granules(daily), daily.since, daily.enabled, odd.enabled) == ({2, 3, 7}, "monday", True, False)
            assert set(disk.bitmaps) == {"daily", "ödd"}
        if end is not None:
            end().close()  # in use still: what a failed fsync has lost is not told again
            assert directories(path)[0][1]["in_use"] is True


@pytest.mark.parametrize("what", ["write_all", "sync"])
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize("end", ["commit", "merge"])
@pytest.mark.parametrize("close", [False, True], ids=["killed", "closed"])
def test_a_directory_that_fails_at_the_end_of_a_job(path, monkeypatch, end, calls, what, close):
    """A commit is done, or it is not and has raised; a merge is always done."""
    result = os.pipe()

    def life():
        disk = cbwcore.Disk(path)
        daily = disk.bitmaps["daily"]
        _, job = freeze(disk, "daily")
        disk.pwrite(b"x", 7 * UNIT)
        with monkeypatch.context() as patch:
            real = getattr(bitmap_file, what)
            left = [calls]

            def some(*args):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(errno.EIO, "Input/output error")
                return real(*args)

            patch.setattr(bitmap_file, what, some)
            committed = False
            if end == "commit":
                try:
                    job.commit("tuesday")
                    committed = True
                except OSError:
                    assert daily.frozen
                    assert granules(daily) == {2, 3}
                    job.merge()
            else:
                job.merge()
        assert not daily.frozen
        assert daily.enabled
        disk.pwrite(b"x", 9 * UNIT)
        assert granules(daily) == ({7, 9} if committed else {2, 3, 7, 9})
        if disk.bitmaps.problem is not None:
            with pytest.raises((OSError, StateError)):
                freeze(disk, "daily")
        os.write(result[1], b"c" if committed else b"m")
        if close:
            disk.close()

    killed(life)
    committed = os.read(result[0], 1) == b"c"
    os.close(result[0])
    os.close(result[1])
    assert committed == (end == "commit" and calls >= 2)
    for _ in range(2):
        with cbwcore.Disk(path) as disk:
            daily = disk.bitmaps["daily"]
            assert (granules(daily), daily.since) == (({7, 9}, "tuesday") if committed else ({2, 3, 7, 9}, "monday"))


def test_a_disk_that_cannot_be_flushed_is_not_called_clean(path, monkeypatch, other_boot):
    disk = cbwcore.Disk(path)
    disk.pwrite(b"x", 7 * UNIT)
    with monkeypatch.context() as patch:
        failing(patch, "sync", count=1)
        with pytest.raises(OSError, match="Input/output error: the disk was not flushed, its bitmaps stay in use"):
            disk.close()
    assert disk.closed
    disk.close()
    assert directories(path)[0][1]["in_use"] is True
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {2, 3, 7}


def test_a_close_that_fails_before_leaves_the_file_in_use(path, monkeypatch):
    disk = cbwcore.Disk(path)
    disk.pwrite(b"x", 7 * UNIT)
    real = disk._close

    class Closing(cbwcore.Disk):
        def _close(self):
            real()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "__class__", Closing)
    with pytest.raises(OSError, match="Input/output error"):
        disk.close()
    assert directories(path)[0][1]["in_use"] is True
    with cbwcore.Disk(path) as disk:  # and nothing is left open or locked
        assert granules(disk.bitmaps["daily"]) == {2, 3, 7}


def test_a_disk_that_cannot_say_that_it_is_in_use_does_not_open(path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "sync", count=1)
        with pytest.raises(OSError, match="Input/output error") as caught:
            cbwcore.Disk(path)
    assert caught.value.filename == sidecar(path)
    assert_all_there(path)


# ---- jobs ----


def test_a_disk_that_is_closed_in_the_middle_of_a_job(path):
    """As if the job had given up; a commit after it says that it came too late."""
    disk = cbwcore.Disk(path)
    _, job = freeze(disk, "daily")
    disk.pwrite(b"x", 7 * UNIT)
    disk.close()
    with pytest.raises(ValueError, match="is closed"):
        job.commit("tuesday")
    job.merge()
    assert granules(disk.bitmaps["daily"]) == {2, 3, 7}
    assert directories(path)[0][1]["in_use"] is False
    with cbwcore.Disk(path) as disk:
        assert (granules(disk.bitmaps["daily"]), disk.bitmaps["daily"].since) == ({2, 3, 7}, "monday")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("end", "left", "since"),
    [("commit", {7}, "tuesday"), ("merge", {2, 3, 7}, "monday"), ("replace", {1, 7}, None)],
)
def test_the_end_of_a_job(path, end, left, since, enabled):
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps["daily"]
        if not enabled:
            daily.disable()
            daily.since = "monday"
            left = left - {7}
        _, job = freeze(disk, "daily")
        assert entries(path)["daily"]["job"]["state"] == "running"
        disk.pwrite(b"x", 7 * UNIT)
        rest = DirtyBitmap(SIZE)
        rest.set_range(UNIT, 1)
        getattr(job, end)(*{"commit": ["tuesday"], "merge": [], "replace": [rest]}[end])
        assert entries(path)["daily"]["job"] is None
        assert entries(path)["daily"]["since"] == since
        assert (granules(daily), daily.since, daily.enabled) == (left, since, enabled)
        disk.pwrite(b"x", 8 * UNIT)
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps["daily"]
        assert (granules(daily), daily.since) == (left | ({8} if enabled else set()), since)


def test_a_t0_that_was_not_leaves_no_job(path):
    with cbwcore.Disk(path) as disk:
        for i in range(255):
            disk.bitmaps.add(f"{i}")
        with pytest.raises(ConfigError, match="at most 256"):
            freeze(disk, "daily")
        assert not disk.bitmaps["daily"].frozen
        assert entries(path)["daily"]["job"] is None
        assert os.stat(sidecar(path)).st_size == 2 * SLOT + 3 * 4096


def test_reset_drops_what_there_was(path):
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps["daily"]
        _, job = freeze(disk, "daily")
        with pytest.raises(ConfigError, match="in use by a job"):
            disk.bitmaps.reset()
        job.merge()
        disk.bitmaps.reset()
        assert len(disk.bitmaps) == 0
        disk.pwrite(b"x", 9 * UNIT)
        assert granules(daily) == {2, 3}
        disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 8 * UNIT)
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {8}


@pytest.mark.parametrize("step", range(12))
def test_a_death_while_the_file_is_made(place, step):
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)

    def life():
        disk = cbwcore.Disk(path)
        die_at(step)
        disk.bitmaps.add("daily", persistent=True)

    killed(life)
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps.problem is None
        if "daily" not in disk.bitmaps:
            disk.bitmaps.add("daily", persistent=True)
        disk.pwrite(b"x", 0)
    assert sorted(os.listdir(place)) == ["disk", "disk.cbw-bitmaps"]
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {0}


@pytest.mark.parametrize("change", ["disable", "remove", "commit"])
def test_what_is_written_in_the_middle_of_a_change_is_covered(path, change):
    """Guests write on at each step of it, and then it dies."""
    for last in range(20):

        def life(last=last):
            disk = cbwcore.Disk(path)
            daily = disk.bitmaps["daily"]
            job = freeze(disk, "daily")[1] if change == "commit" else None
            left = [last]

            def step(what):
                disk.pwrite(b"x", (20 + last - left[0]) * UNIT)
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                left[0] -= 1

            bitmap_file.step = step
            if job is not None:
                job.commit("tuesday")
            elif change == "disable":
                daily.disable()
            else:
                disk.bitmaps.remove("daily")
            bitmap_file.step = lambda what: None
            if daily.enabled and change != "remove":
                disk.pwrite(b"x", 50 * UNIT)

        killed(life)
        with cbwcore.Disk(path) as disk:
            written = {unit for unit in range(20, 51) if disk.pread(1, unit * UNIT) == b"x"}
            daily = disk.bitmaps.get("daily")
            if daily is not None and daily.enabled:
                assert granules(daily) >= written
            if daily is not None:
                disk.bitmaps.remove("daily")
            disk.pwrite_zeroes(20 * UNIT, 40 * UNIT)
            disk.bitmaps.add("daily", persistent=True)
