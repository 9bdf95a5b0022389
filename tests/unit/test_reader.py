"""`Snapshot.open()`: the T0 data as a raw file, and what the standard library makes of it."""

import io
import os
import shutil
import tarfile

import pytest

import cbwcore

CLUSTER = 65536
SIZE = 3 * CLUSTER + 1234


@pytest.fixture
def disk(make_disk):
    return make_disk(SIZE)


@pytest.fixture
def t0(disk):
    return disk.pread(SIZE, 0)


@pytest.fixture
def file(disk, t0):
    """Open on a snapshot of which the guest has overwritten the first half."""
    snapshot = disk.snapshot()
    disk.pwrite(b"\xff" * (SIZE // 2), 0)
    with snapshot.open() as file:
        yield file


def test_it_is_a_raw_readable_seekable_stream(file):
    assert isinstance(file, io.RawIOBase)
    assert (file.readable(), file.seekable(), file.writable(), file.closed, file.isatty()) == (
        True,
        True,
        False,
        False,
        False,
    )


def test_read_from_start_to_end(file, t0):
    assert file.read(10) == t0[:10]
    assert file.tell() == 10
    assert file.read() == t0[10:]
    assert file.tell() == SIZE
    assert file.read(1) == file.read() == b""


@pytest.mark.parametrize("position", [0, 1, CLUSTER - 1, CLUSTER, SIZE // 2, SIZE - 1, SIZE, SIZE + 1, 2**63, 2**70])
def test_seek_and_tell(file, t0, position):
    assert file.seek(position) == file.tell() == position
    assert file.read(100) == t0[position : position + 100]
    assert file.seek(position - SIZE, os.SEEK_END) == position
    file.seek(0)
    assert file.seek(position, os.SEEK_CUR) == position
    assert file.seek(0, os.SEEK_CUR) == position


BUFFERS = {
    "bytearray": bytearray,
    "memoryview": lambda n: memoryview(bytearray(n)),
    "words": lambda n: memoryview(bytearray(n * 4)).cast("I"),
}


@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS.keys())
def test_readinto_fills_what_there_is(file, t0, make):
    buffer = make(100)
    length = memoryview(buffer).nbytes
    file.seek(SIZE - 40)
    assert file.readinto(buffer) == 40
    assert bytes(buffer) == t0[-40:] + bytes(length - 40)
    assert file.readinto(buffer) == 0
    assert file.readinto(bytearray()) == 0


def test_readinto_leaves_the_buffer_free(file):
    buffer = bytearray(10)
    file.readinto(buffer)
    buffer.append(1)


@pytest.mark.parametrize("size", [1, 1000, io.DEFAULT_BUFFER_SIZE, 1 << 20])
def test_buffered_reader(file, t0, size):
    with io.BufferedReader(file, size) as buffered:
        assert buffered.peek(1)[:1] == t0[:1]
        assert buffered.read(CLUSTER + 5) == t0[: CLUSTER + 5]
        buffered.seek(-5, os.SEEK_END)
        assert buffered.read() == t0[-5:]
    assert file.closed


@pytest.mark.parametrize("length", [777, 4097, 1 << 20])
def test_copyfileobj_while_the_guest_goes_on(file, disk, t0, length):
    copy = io.BytesIO()
    copy.write(file.read(SIZE // 3))
    disk.pwrite(b"\x77" * SIZE, 0)
    shutil.copyfileobj(file, copy, length)
    assert copy.getvalue() == t0
    assert disk.pread(SIZE, 0) == b"\x77" * SIZE


def test_files_have_positions_of_their_own(file, t0):
    with file._snapshot.open() as other:
        file.seek(100)
        assert other.read(5) == t0[:5]
        assert file.read(5) == t0[100:105]


def test_a_tar_archive_inside_a_snapshot(make_disk, place):
    """The standard library reads it as any file."""
    (place / "member").write_bytes(b"old" * 1000)
    with tarfile.open(place / "tar", "w") as tar:
        tar.add(place / "member", "member")
    disk = make_disk((place / "tar").read_bytes())
    with disk.snapshot() as snapshot:
        disk.pwrite(bytes(disk.size), 0)
        with tarfile.open(fileobj=snapshot.open()) as tar:
            assert tar.extractfile("member").read() == b"old" * 1000


@pytest.mark.parametrize("size", [0, 1, 511])
def test_small_snapshots(make_disk, size):
    disk = make_disk(size)
    t0 = disk.pread(size, 0)
    with disk.snapshot() as snapshot, snapshot.open() as file:
        disk.pwrite(bytes(size), 0)
        assert file.read() == t0
        assert file.seek(0, os.SEEK_END) == size


def test_closing_a_file_leaves_the_snapshot_open(file, t0):
    file.close()
    file.close()
    assert file._snapshot.pread(5, 0) == t0[:5]


def test_a_file_keeps_its_snapshot_usable_by_itself(disk, t0):
    file = disk.snapshot().open()
    disk.pwrite(b"\xff" * SIZE, 0)
    assert file.read() == t0


def test_errors_are_those_of_pread(disk, t0, plan):
    bitmap = cbwcore.DirtyBitmap(SIZE)
    bitmap.set_range(0, CLUSTER)
    snapshot = disk.snapshot(bitmap=bitmap, on_cbw_error="break-snapshot")
    with snapshot.open() as file:
        assert file.read(CLUSTER) == t0[:CLUSTER]
        with pytest.raises(cbwcore.SnapshotAccessError):
            file.read(1)
        assert file.tell() == CLUSTER, "a failed read does not move"
        plan.error("pwrite")
        snapshot._inject(plan)
        disk.pwrite(b"x", 0)
        file.seek(0)
        with pytest.raises(cbwcore.SnapshotBrokenError):
            file.read(1)
        with pytest.raises(cbwcore.SnapshotBrokenError):
            snapshot.open()
