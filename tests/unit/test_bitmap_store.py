"""The bitmap file: its bytes, what becomes of it when it is damaged, foreign, torn or in use, and when storage
fails."""

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import uuid

import google_crc32c
import pytest
from bitmap_support import UNIT, die_at, freeze, granules, killed, sidecar

import cbwcore
from cbwcore import bitmap_file, bitmap_store
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError
from cbwcore.identity import identify
from cbwcore.options import SnapshotOptions
from cbwcore.snapshot import Wanted, take_snapshots

SIZE = 100 * UNIT + 1000
SLOT = 512 << 10
HEADER = struct.Struct("<8sIIQI4x")


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


def directories(path):
    """Both copies, as anybody can read them."""
    found = []
    with open(sidecar(path), "rb") as f:
        data = f.read(2 * SLOT)
    for at in (0, SLOT):
        magic, version, length, generation, crc = HEADER.unpack_from(data, at)
        text = data[at + HEADER.size : at + HEADER.size + length]
        assert (magic, version) == (b"CBWBITS\n", 1)
        assert crc == google_crc32c.value(data[at : at + 24] + text)
        found.append((generation, json.loads(text)))
    return found


def content(path):
    with open(path, "rb") as f:
        return f.read()


def entries(path):
    return {entry["name"]: entry for entry in directories(path)[0][1]["bitmaps"]}


def poke(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def flip(path, offset):
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 0x55]))


def assert_all_there(path):
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps.problem is None
        daily, odd = disk.bitmaps["daily"], disk.bitmaps["ödd"]
        assert (granules(daily), daily.since, daily.enabled, daily.granularity) == ({2, 3}, "monday", True, UNIT)
        assert (granules(odd), odd.since, odd.enabled, odd.granularity) == ({SIZE // 4096}, None, False, 4096)
        assert all(b.persistent and b.inconsistent is None and not b.frozen for b in (daily, odd))


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


# ---- damage ----


HEADER_BYTES = [0, 7, 8, 12, 16, 19, 24, 27]


@pytest.mark.parametrize("copy", [0, 1])
def test_damage_of_one_copy_loses_nothing(path, copy):
    """Also of the one with the higher generation, and in the middle of a job."""
    length = HEADER.size + len(json.dumps(directories(path)[0][1], separators=(",", ":"), ensure_ascii=False).encode())
    for offset in [*HEADER_BYTES, *range(HEADER.size, length, 37), length - 1]:
        shutil.copyfile(sidecar(path), sidecar(path) + ".kept")
        flip(sidecar(path), copy * SLOT + offset)
        assert_all_there(path)
        with cbwcore.Disk(path, read_only=True) as disk:
            assert len(disk.bitmaps) == 2
        assert directories(path)[0] == directories(path)[1], "it is made good"
        shutil.copyfile(sidecar(path) + ".kept", sidecar(path))

    def job():
        disk = cbwcore.Disk(path)
        _, job = freeze(disk, "daily")
        disk.pwrite(b"x", 7 * UNIT)
        job.commit("tuesday")
        freeze(disk, "daily")
        disk.pwrite(b"x", 8 * UNIT)

    killed(job)
    poke(sidecar(path), copy * SLOT, bytes(SLOT))
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {7, 8}
        assert disk.bitmaps["daily"].since == "tuesday"


@pytest.mark.parametrize("copy", [0, 1])
def test_the_copy_that_is_no_good_is_written_first(path, monkeypatch, copy):
    """A death in the middle of the other would leave none."""
    flip(sidecar(path), copy * SLOT)
    steps = []
    monkeypatch.setattr(bitmap_file, "step", steps.append)
    cbwcore.Disk(path).close()
    assert steps[0] == f"copy {copy}"


@pytest.mark.parametrize("copy", [0, 1])
def test_the_later_copy_counts(path, copy):
    """A process died between the two."""
    generation, directory = directories(path)[0]
    directory["bitmaps"][0]["since"] = "later"
    text = json.dumps(directory).encode()
    head = HEADER.pack(b"CBWBITS\n", 1, len(text), generation + 1, 0)[:24]
    poke(sidecar(path), copy * SLOT, head + struct.pack("<I4x", google_crc32c.value(head + text)) + text)
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps["daily"].since == "later"
    assert [d["bitmaps"][0]["since"] for _, d in directories(path)] == ["later", "later"]


@pytest.mark.parametrize("offset", [*HEADER_BYTES, HEADER.size, HEADER.size + 100])
def test_damage_of_both_copies(path, offset, caplog):
    flip(sidecar(path), offset)
    flip(sidecar(path), SLOT + offset)
    refused(path, "damaged|version", caplog)


@pytest.mark.parametrize("size", [0, 20, 4096, SLOT, SLOT + 40])
def test_cut_off(path, size, caplog):
    os.truncate(sidecar(path), size)
    if size >= 4096:  # a copy is there; the areas are not
        with cbwcore.Disk(path) as disk:
            assert {b.inconsistent for b in disk.bitmaps.values()} == {"the bitmap file is cut off"}
        return
    refused(path, "damaged", caplog)


def refused(path, text, caplog):
    """The disk opens; nothing of the file is used; a new one can be started."""
    before = content(sidecar(path))
    for read_only in (True, False):
        with cbwcore.Disk(path, read_only=read_only) as disk:
            assert len(disk.bitmaps) == 0
            assert disk.bitmaps.problem is not None
            assert sidecar(path) in disk.bitmaps.problem
    assert "no persistent bitmap can be used" in caplog.text
    assert content(sidecar(path)) == before
    with cbwcore.Disk(path) as disk:
        with pytest.raises(StateError, match=text):
            disk.bitmaps.add("daily", persistent=True)
        in_memory = disk.bitmaps.add("daily")
        disk.bitmaps.reset()
        assert disk.bitmaps.problem is None
        assert disk.bitmaps["daily"] is in_memory
        disk.bitmaps.add("new", persistent=True)
        disk.pwrite(b"x", 0)
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["new"]) == {0}
        assert list(disk.bitmaps) == ["new"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": -1}, "granularity"),
        ({"size": 2**63}, "granularity|cannot be read"),
        ({"bitmaps": 5}, "cannot be read"),
        ({"more": 5}, "cannot be read"),
        ({"granularity": 1000}, "granularity 1000"),
        ({"granularity": 0}, "granularity 0"),
        ({"length": 8192}, "area of 8192 bytes"),
        ({"offset": 0}, "where none can be"),
        ({"offset": (1 << 20) + 1}, "where none can be"),
        ({"offset": (1 << 20) + 4096}, "where none can be"),
        ({"offset": 2**63 - 4096}, "where none can be"),
        ({"name": "ödd"}, "two bitmaps"),
        ({"name": ""}, "1 to 1023 bytes"),
        ({"job": {"state": "running", "offset": 1 << 20}}, "where none can be"),
        ({"job": {"state": "odd", "offset": 2 << 20}}, "cannot be read"),
    ],
    ids=str,
)
def test_a_directory_that_makes_no_sense(path, caplog, change, text):
    """Its checksum is right all the same."""
    generation, directory = directories(path)[0]
    for key, value in change.items():
        place = directory if key in directory or key == "more" else directory["bitmaps"][0]
        place[key] = value
    record = json.dumps(directory).encode()
    head = HEADER.pack(b"CBWBITS\n", 1, len(record), generation, 0)[:24]
    for at in (0, SLOT):
        poke(sidecar(path), at, head + struct.pack("<I4x", google_crc32c.value(head + record)) + record)
    refused(path, text, caplog)


def test_a_later_version(path, caplog):
    text = b'{"new":1}'
    for at in (0, SLOT):
        head = HEADER.pack(b"CBWBITS\n", 2, len(text), 9, 0)[:24]
        poke(sidecar(path), at, head + struct.pack("<I4x", google_crc32c.value(head + text)) + text)
    refused(path, "it is of version 2, this cbwcore knows version 1", caplog)


@pytest.mark.parametrize("byte", [0, 12])
def test_damage_of_bits(path, byte):
    """Of that bitmap alone."""
    flip(sidecar(path), entries(path)["daily"]["offset"] + byte)
    with cbwcore.Disk(path, read_only=True) as disk:
        assert disk.bitmaps["daily"].inconsistent == "its bits are damaged"
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps["daily"].inconsistent == "its bits are damaged"
        assert granules(disk.bitmaps["ödd"]) == {SIZE // 4096}
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps["daily"].inconsistent == "its bits are damaged"
        disk.bitmaps.remove("daily")


# ---- not the disk that it was ----


def test_of_another_disk(path, place, caplog):
    shutil.copyfile(path, place / "copy")
    shutil.copyfile(sidecar(path), sidecar(place / "copy"))
    refused(place / "copy", "is of another disk: file inode", caplog)
    assert_all_there(path)


def test_renamed(path, place):
    os.rename(path, place / "new")
    os.rename(sidecar(path), sidecar(place / "new"))
    assert_all_there(place / "new")


@pytest.mark.parametrize("size", [SIZE + 1, SIZE - 1, 0])
def test_resized(path, caplog, size):
    os.truncate(path, size)
    with cbwcore.Disk(path, read_only=True) as disk:
        assert disk.bitmaps.problem.endswith(f"the disk was resized from {SIZE} bytes to {size}")
    with cbwcore.Disk(path) as disk:
        assert len(disk.bitmaps) == 0
        with pytest.raises(StateError, match="resized"):
            disk.bitmaps.add("x", persistent=True)
    os.truncate(path, SIZE)
    with cbwcore.Disk(path) as disk:
        assert {b.inconsistent for b in disk.bitmaps.values()} == {f"the disk was resized from {SIZE} bytes"}
    os.truncate(path, size)
    with cbwcore.Disk(path) as disk:
        disk.bitmaps.reset()
        disk.bitmaps.add("x", persistent=True)


def test_written_without_its_bitmaps(path):
    poke(path, 5 * UNIT, b"x")
    for read_only in (True, False, True, False):
        with cbwcore.Disk(path, read_only=read_only) as disk:
            why = {b.inconsistent for b in disk.bitmaps.values()}
            assert why == {"the disk was written without its bitmaps"}
            assert disk.bitmaps.problem is None


def test_opened_without_being_written_it_is_as_it_was(path):
    with open(path, "rb") as f:
        f.read()
    assert_all_there(path)


# ---- another boot ----


def test_the_machine_went_down(path, other_boot, caplog):
    killed(lambda: cbwcore.Disk(path))
    other_boot()
    for read_only in (True, False, False):
        with cbwcore.Disk(path, read_only=read_only) as disk:
            assert {b.inconsistent for b in disk.bitmaps.values()} == {bitmap_store.WENT_DOWN}
    assert "bitmap 'daily' is inconsistent: the machine went down" in caplog.text


def test_the_machine_went_down_while_it_was_not_in_use(path, other_boot):
    other_boot()
    assert_all_there(path)


def test_an_inconsistent_bitmap_is_for_nothing_but_removal(path, other_boot):
    killed(lambda: cbwcore.Disk(path))
    other_boot()
    with cbwcore.Disk(path) as disk:
        daily = disk.bitmaps["daily"]
        other = DirtyBitmap(SIZE)
        assert not daily.enabled
        assert daily.since is None
        assert "inconsistent" in repr(daily)
        uses = [
            daily.enable,
            daily.disable,
            daily.clear,
            daily.count,
            daily.ranges,
            daily.numpy,
            daily.bitarray,
            lambda: daily.set_range(0, 1),
            lambda: daily.is_dirty(0),
            lambda: daily.run_at(0, 1),
            lambda: daily.merge(other),
            lambda: other.merge(daily),
            lambda: list(disk.block_status(bitmap=daily)),
            lambda: disk.snapshot(bitmap=daily),
            lambda: disk.snapshot(bitmap="daily"),
            lambda: freeze(disk, "daily"),
            lambda: take_snapshots([Wanted(disk, SnapshotOptions(), copies=[daily])]),
            lambda: setattr(daily, "since", "x"),
            lambda: cbwcore.nbd.exports.Export("e", disk, bitmaps=[daily]),
        ]
        for use in uses:
            with pytest.raises(StateError, match="bitmap 'daily' is inconsistent, remove it: the machine went down"):
                use()
        with pytest.raises(BufferError, match="inconsistent"):
            memoryview(daily)
        assert disk.stats().snapshots == 0
        with pytest.raises(ConfigError, match="has a bitmap 'daily' already"):
            disk.bitmaps.add("daily", persistent=True)
        disk.bitmaps.remove("daily")
        disk.bitmaps.add("daily", persistent=True)
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps["daily"].inconsistent is None
        assert disk.bitmaps["ödd"].inconsistent == bitmap_store.WENT_DOWN


# ---- the machine dies ----


class Machine:
    """What of the bitmap file is on storage at any time: what the last fsync found, and of what came after any part."""

    def __init__(self, path, monkeypatch):
        self.path = path
        self.durable = b""
        self.deaths = []  # (where, image)
        self.rng = random.Random(5)
        monkeypatch.setattr(bitmap_file, "sync", self.sync)
        monkeypatch.setattr(bitmap_file, "step", self.step)

    def look(self):
        for name in (sidecar(self.path), sidecar(self.path) + ".partial"):
            if os.path.exists(name):
                return name, content(name)
        return sidecar(self.path), b""

    def sync(self, fd):
        os.fsync(fd)
        where = os.readlink(f"/proc/self/fd/{fd}")
        if where.startswith(sidecar(self.path)):
            self.durable = content(where)
        self.deaths.append(("after fsync", *self.torn(0)))

    def step(self, what):
        self.deaths += [(what, *self.torn(share)) for share in (0, 0.3, 0.7, 1)]

    def torn(self, share):
        """The file where of each sector that has changed since the last fsync ``share`` has reached storage."""
        name, now = self.look()
        image = bytearray(self.durable.ljust(len(now), b"\0"))
        for at in range(0, len(now), 512):
            if now[at : at + 512] != image[at : at + 512] and self.rng.random() < share:
                image[at : at + 512] = now[at : at + 512]
        return name, bytes(image)


def test_the_machine_dies_at_any_step(place, monkeypatch):
    """What is left is never short: it covers all, or is inconsistent; and never a file that cannot be read."""
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    machine = Machine(path, monkeypatch)
    written = set()
    must = []  # for each death: what a consistent bitmap covers

    def write(unit):
        disk.pwrite(b"x", unit * UNIT)
        written.add(unit)
        machine.step("write")
        note()

    def note():
        must.extend([frozenset(written)] * (len(machine.deaths) - len(must)))

    for life in range(3):
        disk = cbwcore.Disk(path)
        note()
        if life == 0:
            disk.bitmaps.add("daily", persistent=True)
            note()
        write(10 * life)
        if life == 1:
            _, job = freeze(disk, "daily")
            write(12)
            before = set(written)
            written -= {0, 1, 10}  # from the commit on, at the latest
            job.commit("first")
            note()
            assert before == {0, 1, 10, 12}
        if life == 2:
            _, job = freeze(disk, "daily")
            write(22)
            job.merge()
        write(10 * life + 1)
        disk.close()
        note()
    status = os.stat(path)
    monkeypatch.undo()
    kept = content(sidecar(path))
    monkeypatch.setattr(bitmap_file, "boot_id", lambda: "another")
    assert len(machine.deaths) == len(must) > 100
    outcomes = set()
    for (where, name, image), units in zip(machine.deaths, must, strict=True):
        for each in (sidecar(path), sidecar(path) + ".partial"):
            if os.path.exists(each):
                os.unlink(each)
        with open(name, "wb") as f:
            f.write(image)
        for clean_mtime in [None] if not image else {e["mtime_ns"] for e in found_in(image)}:
            if clean_mtime is not None:
                os.utime(path, ns=(status.st_atime_ns, clean_mtime))
        with cbwcore.Disk(path, read_only=True) as disk:
            assert name.endswith(".partial") or disk.bitmaps.problem is None, where
            bitmap = disk.bitmaps.get("daily")
            outcome = "absent" if bitmap is None else "inconsistent" if bitmap.inconsistent else "usable"
            outcomes.add(outcome)
            if outcome == "usable":
                assert granules(bitmap) >= units, where
    assert outcomes == {"absent", "inconsistent", "usable"}
    with open(sidecar(path), "wb") as f:
        f.write(kept)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {11, 12, 20, 21, 22}


def found_in(image):
    """The directories that can be read."""
    for at in (0, SLOT):
        magic, _, length, _, crc = HEADER.unpack_from(image.ljust(SLOT * 2, b"\0"), at)
        text = image[at + HEADER.size : at + HEADER.size + length]
        if magic == b"CBWBITS\n" and crc == google_crc32c.value(image[at : at + 24] + text):
            yield json.loads(text)


def test_the_order_of_things(path, monkeypatch):
    """In use before a write can be recorded; the disk, then the bits, then the directory that calls them clean."""
    calls = []

    def sync(fd):
        calls.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        os.fsync(fd)

    def write_all(fd, data, offset):
        bitmap = cbwcore.bitmap_file.HEADER.size
        calls.append(("write", offset, json.loads(data[bitmap:])["in_use"]))
        return real(fd, data, offset)

    real = bitmap_file.write_all
    monkeypatch.setattr(bitmap_file, "sync", sync)
    monkeypatch.setattr(bitmap_file, "write_all", write_all)
    disk = cbwcore.Disk(path)
    name = os.path.basename(sidecar(path))
    first, second = (c[1] for c in calls if c[0] == "write")
    assert {first, second} == {0, SLOT}
    assert calls == [("write", first, True), ("sync", name), ("write", second, True), ("sync", name)]
    for begin in (lambda: disk.bitmaps.add("new", persistent=True), lambda: freeze(disk, "new")):
        calls.clear()
        begin()
        assert [c[0] for c in calls] == ["sync", "write", "sync", "write", "sync"], (
            "an area is durable before it is named"
        )
    calls.clear()
    disk.close()
    assert calls[:2] == [("sync", "disk"), ("sync", name)]
    assert [c[2] for c in calls if c[0] == "write"] == [False, False]
    assert calls[-1] == ("sync", name)


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
