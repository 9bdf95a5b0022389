"""A bitmap file that is damaged, foreign, or of another boot."""

import json
import os
import shutil
import struct

import google_crc32c
import pytest
from bitmap_support import (
    HEADER,
    SIZE,
    SLOT,
    UNIT,
    assert_all_there,
    content,
    directories,
    entries,
    flip,
    freeze,
    granules,
    killed,
    poke,
    sidecar,
)

import cbwcore
from cbwcore import bitmap_file, bitmap_store
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError
from cbwcore.options import SnapshotOptions
from cbwcore.snapshot import Wanted, take_snapshots

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
