"""The bitmap file: its bytes, its place, and whose it is."""

import errno
import os
import shutil

import google_crc32c
import pytest
from bitmap_support import (
    SIZE,
    SLOT,
    UNIT,
    assert_all_there,
    directories,
    entries,
    freeze,
    granules,
    sidecar,
)

import cbwcore
from cbwcore import bitmap_store
from cbwcore.errors import ConfigError
from cbwcore.identity import identify

# ---- the bytes ----


def test_what_is_in_the_file(path):
    first, second = directories(path)
    assert first == second
    assert set(first[1]) == {"identity", "size", "in_use", "boot_id", "mtime_ns", "bitmaps"}
    assert first[1]["size"] == SIZE
    assert first[1]["in_use"] is False
    assert first[1]["mtime_ns"] == os.stat(path).st_mtime_ns
    daily = entries(path)["daily"]
    with open(sidecar(path), "rb") as f:
        data = f.read()
    bits = data[daily["offset"] : daily["offset"] + 13]
    assert daily["offset"] % 4096 == 0
    assert daily["offset"] >= 2 * SLOT
    assert (bits, daily["crc"]) == (b"\x0c" + bytes(12), google_crc32c.value(b"\x0c" + bytes(12)))
    assert os.stat(sidecar(path)).st_mode & 0o777 == 0o600
    with cbwcore.Disk(path):
        assert [d["in_use"] for _, d in directories(path)] == [True, True]
        assert {e["crc"] for e in entries(path).values()} == {None}


def test_all_of_it_comes_again(path):
    assert_all_there(path)
    assert_all_there(path)
    with cbwcore.Disk(path) as disk:
        disk.bitmaps["daily"].disable()
        disk.bitmaps["ödd"].enable()
        disk.pwrite(b"x", 9 * UNIT)
        disk.bitmaps["daily"].merge(disk.bitmaps["ödd"])
        in_memory = disk.bitmaps.add("gone")
        assert not in_memory.persistent
    with cbwcore.Disk(path) as disk:
        assert set(disk.bitmaps) == {"daily", "ödd"}
        daily, odd = disk.bitmaps.values()
        assert (granules(daily), daily.since, daily.enabled) == ({2, 3, 9, 100}, None, False)
        assert (granules(odd), odd.enabled) == ({144, SIZE // 4096}, True)
        odd.since = "x"
        odd.clear()
        disk.bitmaps.remove("daily")
    with cbwcore.Disk(path) as disk:
        assert list(disk.bitmaps) == ["ödd"]
        assert (disk.bitmaps["ödd"].count(), disk.bitmaps["ödd"].since) == (0, None)


def test_the_file_is_beside_the_disk_whatever_link_it_is_opened_by(path, place):
    (place / "elsewhere").mkdir()
    os.symlink(path, place / "elsewhere" / "link")
    with cbwcore.Disk(place / "elsewhere" / "link") as disk:
        assert set(disk.bitmaps) == {"daily", "ödd"}
        assert disk.bitmaps.path == sidecar(path)


def test_a_place_of_its_own(path, place):
    own = place / "own"
    with cbwcore.Disk(path, bitmaps=own) as disk:
        assert len(disk.bitmaps) == 0
        assert not own.exists()
        disk.bitmaps.add("x", persistent=True)
    assert own.exists()
    with cbwcore.Disk(path, bitmaps=os.fsencode(own)) as disk:
        assert list(disk.bitmaps) == ["x"]


def test_after_close_the_bits_are_in_memory(path):
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps["daily"]
        view = memoryview(daily)
    with cbwcore.Disk(path) as disk:
        disk.pwrite(b"x", 50 * UNIT)
        assert granules(daily) == {2, 3}
        assert view[6] == 0
        for change in (daily.clear, daily.disable, daily.enable, lambda: daily.set_range(0, 1)):
            with pytest.raises(ValueError, match="is closed"):
                change()
        assert granules(disk.bitmaps["daily"]) == {2, 3, 50}


def test_a_removed_bitmap_keeps_its_bits_to_itself(path):
    with cbwcore.Disk(path) as disk:
        removed = disk.bitmaps["daily"]
        disk.bitmaps.remove("daily")
        new = disk.bitmaps.add("new", persistent=True)
        assert entries(path)["new"]["offset"] == 2 * SLOT
        assert not removed.persistent
        assert granules(removed) == {2, 3}
        assert new.count() == 0
        removed.set_range(0, SIZE)
        assert new.count() == 0


def test_areas_are_used_again_and_blank(path):
    size = os.stat(sidecar(path)).st_size
    with cbwcore.Disk(path) as disk:
        for i in range(10):
            bitmap = disk.bitmaps.add(f"{i}", persistent=True)
            assert bitmap.count() == 0
            bitmap.set_range(0, SIZE)
            disk.bitmaps.remove(f"{i}")
            _, job = freeze(disk, "daily")
            disk.pwrite(b"x" * SIZE, 0)
            job.commit(f"{i}")
            disk.bitmaps["daily"].clear()
    assert os.stat(sidecar(path)).st_size <= size + 2 * 4096


@pytest.mark.parametrize("refused", [errno.EOPNOTSUPP, errno.EIO])
def test_without_holes_areas_are_blank_too(path, monkeypatch, refused):
    def punch_hole(fd, offset, length):
        raise OSError(refused, os.strerror(refused))

    with cbwcore.Disk(path) as disk:
        disk.bitmaps["daily"].set_range(0, SIZE)
        monkeypatch.setattr(bitmap_store, "punch_hole", punch_hole)
        disk.bitmaps.remove("daily")
        if refused == errno.EIO:
            with pytest.raises(OSError, match="Input/output error: 4096 bytes for the bits of bitmap 'new'"):
                disk.bitmaps.add("new", persistent=True)
            assert list(disk.bitmaps) == ["ödd"]
            return
        assert disk.bitmaps.add("new", persistent=True).count() == 0


def test_a_directory_that_is_full(path):
    with cbwcore.Disk(path) as disk:

        def fill():
            for i in range(600):
                disk.bitmaps.add(f"{i}" + "n" * 1000, persistent=True, enabled=False)

        with pytest.raises(ConfigError, match="more than there are"):
            fill()
        assert disk.bitmaps.problem is None
        count = len(disk.bitmaps)
        assert count > 300
        disk.bitmaps.remove("daily")
    with cbwcore.Disk(path) as disk:
        assert len(disk.bitmaps) == count - 1


def test_too_many_that_record(place):
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    with cbwcore.Disk(path) as disk:
        for i in range(256):
            disk.bitmaps.add(f"{i}")
        with pytest.raises(ConfigError, match="at most 256 bitmaps"):
            disk.bitmaps.add("new", persistent=True)
        assert "new" not in disk.bitmaps
        assert os.listdir(place) == ["disk"]
        disk.bitmaps.add("new", persistent=True, enabled=False)
        with pytest.raises(ConfigError, match="at most 256 bitmaps"):
            disk.bitmaps["new"].enable()
        assert entries(path)["new"]["enabled"] is False


# ---- identity ----


def of(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return identify(fd)
    finally:
        os.close(fd)


def test_identity_of_a_file(place):
    a, b = place / "a", place / "b"
    a.write_bytes(b"1")
    before = of(a)
    assert before.isprintable()
    assert before.startswith(f"file inode {a.stat().st_ino}")
    a.write_bytes(b"22")
    os.utime(a, (0, 0))
    a.rename(b)
    assert of(b) == before
    shutil.copyfile(b, a)
    assert of(a) != before
    inode = b.stat().st_ino
    b.unlink()
    for _ in range(50):  # a file system may give the inode to the next
        b.write_bytes(b"1")
        if b.stat().st_ino == inode:
            assert of(b) != before
        b.unlink()


def test_identity_of_loop_devices(resources, place):
    image, other = place / "image", place / "other"
    for each in (image, other):
        each.write_bytes(bytes(1 << 20))
    try:
        first, second, third = (resources.loop(str(p)) for p in (image, image, other))
    except RuntimeError as e:
        pytest.skip(str(e))
    assert of(first) == of(second) != of(third)
    assert of(first) == f"loop of {of(image)} start 0"
    image.rename(place / "renamed")
    assert of(first) == f"loop of {of(place / 'renamed')} start 0"


def test_a_block_device_needs_a_place_for_them(resources, place):
    image = place / "image"
    image.write_bytes(bytes(1 << 20))
    try:
        device = resources.loop(str(image))
    except RuntimeError as e:
        pytest.skip(str(e))
    with cbwcore.Disk(device) as disk:
        assert disk.bitmaps.path is None
        for use in (lambda: disk.bitmaps.add("x", persistent=True), disk.bitmaps.reset):
            with pytest.raises(ConfigError, match=r"no place beside it .*: Disk\(path, bitmaps=PATH\)"):
                use()
        disk.bitmaps.add("x")
    own = place / "own"
    for _ in range(2):
        with cbwcore.Disk(device, bitmaps=own) as disk:
            bitmap = disk.bitmaps.get("x") or disk.bitmaps.add("x", persistent=True)
            disk.pwrite(b"x", 3 * UNIT)
            assert granules(bitmap) == {3}
