"""What the engine must refuse: the right error, with the value and the limit in its text, and nothing changed."""

import contextlib
import errno
import math
import os
import re
import subprocess
import sys

import bitarray
import numpy as np
import pytest

import cbwcore

CLUSTER = 65536
SIZE = 3 * CLUSTER + 1000

WRONG_TYPES = [1.5, 0.0, "1", b"1", [], 1j]

# name -> call(disk, snapshot, offset, length)
RANGE_CALLS = {
    "disk.pread": lambda d, s, offset, length: d.pread(length, offset),
    "disk.pwrite_zeroes": lambda d, s, offset, length: d.pwrite_zeroes(offset, length),
    "disk.discard": lambda d, s, offset, length: d.discard(offset, length),
    "disk.block_status": lambda d, s, offset, length: list(d.block_status(offset, length)),
    "snapshot.pread": lambda d, s, offset, length: s.pread(length, offset),
    "snapshot.discard": lambda d, s, offset, length: s.discard(offset, length),
    "snapshot.block_status": lambda d, s, offset, length: list(s.block_status(offset, length)),
}
BUFFER_CALLS = {
    "disk.pread_into": lambda d, s, offset, buffer: d.pread_into(buffer, offset),
    "disk.pwrite": lambda d, s, offset, buffer: d.pwrite(buffer, offset),
    "snapshot.pread_into": lambda d, s, offset, buffer: s.pread_into(buffer, offset),
}


def by_name(calls):
    return pytest.mark.parametrize("call", calls.values(), ids=calls.keys())


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def disk(request, make_disk):
    try:
        return make_disk(SIZE, direct=request.param)
    except cbwcore.ConfigError as e:
        pytest.skip(str(e))


@pytest.fixture
def armed(disk, place):
    """A snapshot whose maps are in use: one cluster copied."""
    snapshot = disk.snapshot(place / "armed.img")
    disk.pwrite(b"new", 10)
    return snapshot


# ---- offsets and lengths ----


@by_name(RANGE_CALLS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, 1),
        (0, -1),
        (-1, -1),
        (-(2**63), 1),
        (-(2**64), 0),
        (2**63 - 1, 1),
        (2**63 - 1, 2**63 - 1),
        (2**63, 0),
        (0, 2**63),
        (2**64, 1),
        (0, 2**64),
        (1, 2**64 - 1),
        (2**64 - 1, 2),
        (2**70, 1),
        (0, 2**70),
        (SIZE, 1),
        (SIZE + 1, 0),
        (0, SIZE + 1),
        (SIZE - 1, 2),
        (1, 2**63 - 1),
        (2 * SIZE, -SIZE),
    ],
)
def test_a_range_outside_the_disk_is_refused(disk, armed, unchanged, call, offset, length):
    with unchanged(disk), pytest.raises(cbwcore.ConfigError) as refused:
        call(disk, armed, offset, length)
    text = str(refused.value)
    assert str(offset) in text or str(length) in text
    assert str(SIZE) in text or str(2**63 - 1) in text


@by_name(BUFFER_CALLS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, 1),
        (-(2**63) - 1, 1),
        (2**63 - 1, 1),
        (2**63, 1),
        (2**64, 1),
        (2**70, 0),
        (SIZE, 1),
        (SIZE + 1, 0),
        (1, SIZE),
    ],
)
def test_a_buffer_outside_the_disk_is_refused_and_given_back(disk, armed, unchanged, call, offset, length):
    buffer = bytearray(b"\x5a" * length)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError) as refused:
        call(disk, armed, offset, buffer)
    assert str(offset) in str(refused.value)
    assert str(SIZE) in str(refused.value) or str(2**63 - 1) in str(refused.value)
    assert buffer == b"\x5a" * length
    buffer.append(1)  # BufferError where the engine still held it


@by_name(RANGE_CALLS)
@pytest.mark.timeout(5)  # a fraction once made block status join empty extents for ever
@pytest.mark.parametrize("wrong", [*WRONG_TYPES, None], ids=repr)
def test_offsets_and_lengths_are_integers(disk, armed, unchanged, call, wrong):
    with unchanged(disk):
        with pytest.raises((TypeError, cbwcore.ConfigError)):
            call(disk, armed, wrong, 1)
        if wrong is None and "block_status" in call.__code__.co_names:
            return  # there it means: up to the end
        with pytest.raises((TypeError, cbwcore.ConfigError)):
            call(disk, armed, 0, wrong)


@by_name(BUFFER_CALLS)
@pytest.mark.parametrize("wrong", [*WRONG_TYPES, None], ids=repr)
def test_the_offset_of_a_buffer_is_an_integer(disk, armed, unchanged, call, wrong):
    with unchanged(disk), pytest.raises((TypeError, cbwcore.ConfigError)):
        call(disk, armed, wrong, bytearray(1))


@by_name({name: RANGE_CALLS[name] for name in ("disk.block_status", "snapshot.block_status")})
@pytest.mark.parametrize("wrong", [0.0, "0"])
def test_block_status_of_nothing_still_wants_integers(disk, armed, call, wrong):
    with pytest.raises((TypeError, cbwcore.ConfigError)):
        call(disk, armed, wrong, 0)


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, 10 * SIZE])
@pytest.mark.parametrize("source", ["disk", "snapshot"])
def test_block_status_by_a_bitmap_of_another_size_is_refused(disk, armed, source, size):
    with pytest.raises(cbwcore.ConfigError, match=str(size)):
        list({"disk": disk, "snapshot": armed}[source].block_status(bitmap=cbwcore.DirtyBitmap(size)))


@by_name(RANGE_CALLS)
def test_an_empty_range_at_the_very_end_is_fine(disk, armed, unchanged, call):
    with unchanged(disk):
        assert not call(disk, armed, SIZE, 0)


# ---- buffers ----


def read_only_array():
    array = np.zeros(16, np.uint8)
    array.flags.writeable = False
    return array


READ_ONLY = {"bytes": lambda: b"x" * 16, "memoryview": lambda: memoryview(b"x" * 16), "numpy": read_only_array}
SCATTERED = {
    "memoryview-step": lambda: memoryview(bytearray(32))[::2],
    "memoryview-reversed": lambda: memoryview(bytearray(16))[::-1],
    "numpy-step": lambda: np.zeros(32, np.uint8)[::2],
    "numpy-fortran": lambda: np.zeros((4, 4), np.uint8, order="F"),
}
NO_BUFFER = {"None": lambda: None, "str": lambda: "text", "int": lambda: 16, "list": lambda: [0] * 16}


@by_name({name: BUFFER_CALLS[name] for name in ("disk.pread_into", "snapshot.pread_into")})
@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY.keys())
def test_a_read_only_buffer_cannot_be_read_into(disk, armed, unchanged, call, make):
    buffer = make()
    before = bytes(buffer)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="writable"):
        call(disk, armed, 0, buffer)
    assert bytes(buffer) == before


@by_name(BUFFER_CALLS)
@pytest.mark.parametrize("make", [*SCATTERED.values(), *NO_BUFFER.values()], ids=[*SCATTERED, *NO_BUFFER])
def test_a_buffer_must_be_contiguous_memory(disk, armed, unchanged, call, make):
    buffer = make()
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=f"contiguous.*{type(buffer).__name__}"):
        call(disk, armed, 0, buffer)


# ---- closed objects ----

DISK_CALLS = {
    "pread": lambda d: d.pread(1, 0),
    "pread nothing": lambda d: d.pread(0, 0),
    "pread_into": lambda d: d.pread_into(bytearray(1), 0),
    "pread_into nothing": lambda d: d.pread_into(bytearray(), 0),
    "pwrite": lambda d: d.pwrite(b"x", 0),
    "pwrite nothing": lambda d: d.pwrite(b"", 0),
    "pwrite fua": lambda d: d.pwrite(b"x", 0, fua=True),
    "pwrite_zeroes": lambda d: d.pwrite_zeroes(0, 1),
    "discard": lambda d: d.discard(0, 1),
    "flush": lambda d: d.flush(),
    "block_status": lambda d: list(d.block_status()),
    "snapshot": lambda d: d.snapshot(),
    "snapshot_group": lambda d: cbwcore.snapshot_group([(d, None)]),
    "bitmaps.add": lambda d: d.bitmaps.add("new"),
    "bitmap.enable": lambda d: d.bitmaps["idle"].enable(),
}


def set_policy(snapshot):
    snapshot.on_cbw_error = "break-snapshot"


def set_timeout(snapshot):
    snapshot.cbw_timeout = 1.0


SNAPSHOT_CALLS = {
    "pread": lambda s: s.pread(1, 0),
    "pread nothing": lambda s: s.pread(0, 0),
    "pread_into": lambda s: s.pread_into(bytearray(1), 0),
    "block_status": lambda s: list(s.block_status()),
    "discard": lambda s: s.discard(0, CLUSTER),
    "discard nothing": lambda s: s.discard(1, 1),
    "open": lambda s: s.open(),
    "stats": lambda s: s.stats(),
    "on_cbw_error": set_policy,
    "cbw_timeout": set_timeout,
}
FILE_CALLS = {
    "read": lambda f: f.read(1),
    "readall": lambda f: f.read(),
    "readinto": lambda f: f.readinto(bytearray(1)),
    "read nothing at the end": lambda f: (f.seek(0, 2), f.readinto(bytearray(1))),
}


def assert_closed(call, thing):
    with pytest.raises(ValueError, match=r"closed") as refused:
        call(thing)
    assert not isinstance(refused.value, cbwcore.ConfigError)


@by_name(DISK_CALLS)
def test_a_closed_disk_refuses(disk, unchanged, place, call):
    disk.bitmaps.add("idle", enabled=False)
    disk.close()
    disk.close()
    with unchanged(disk):
        assert_closed(call, disk)


@by_name(SNAPSHOT_CALLS)
@pytest.mark.parametrize("closed_by", ["snapshot.close", "disk.close"])
def test_a_closed_snapshot_refuses(disk, armed, unchanged, closed_by, call):
    (armed if closed_by == "snapshot.close" else disk).close()
    armed.close()
    with unchanged(disk):
        assert_closed(call, armed)
    assert armed.state == "closed"


@by_name(FILE_CALLS)
@pytest.mark.parametrize("closed", ["file", "snapshot", "disk"])
def test_a_file_refuses_once_it_or_its_snapshot_is_closed(disk, armed, closed, call):
    file = armed.open()
    {"file": file, "snapshot": armed, "disk": disk}[closed].close()
    assert_closed(call, file)


@by_name({"seek": lambda f: f.seek(0), "tell": lambda f: f.tell()})
def test_a_closed_file_has_no_position_either(armed, call):
    file = armed.open()
    file.close()
    assert_closed(call, file)


# ---- targets ----


def symlink(place, disk):
    (place / "link").symlink_to(disk.path)
    return place / "link"


def hard_link(place, disk):
    os.link(disk.path, place / "link")
    return place / "link"


def other_spelling(place, disk):
    return os.path.join(place, ".", "..", place.name, os.path.basename(disk.path))


def file_of(size):
    def make(place, disk):
        (place / "bad.img").write_bytes(b"\xaa" * size)
        return place / "bad.img"

    return make


def dangling(place, disk):
    (place / "link").symlink_to(place / "nowhere" / "target")
    return place / "link"


def fifo(place, disk):
    os.mkfifo(place / "fifo")
    return place / "fifo"


def under_a_file(place, disk):
    (place / "file").write_bytes(b"")
    return place / "file" / "target"


BAD_TARGETS = {
    "the disk": (lambda place, disk: disk.path, "is the disk itself"),
    "the disk by symlink": (symlink, "is the disk itself"),
    "the disk by hard link": (hard_link, "is the disk itself"),
    "the disk by another spelling": (other_spelling, "is the disk itself"),
    "the disk by its descriptor": (lambda place, disk: f"/proc/self/fd/{disk._file.fd}", "is the disk itself"),
    "a byte too small": (file_of(SIZE - 1), f"{SIZE - 1} bytes, less than the disk's {SIZE}"),
    "empty": (file_of(0), f"0 bytes, less than the disk's {SIZE}"),
    "a directory": (lambda place, disk: place, os.strerror(errno.EISDIR)),
    "in a missing directory": (lambda place, disk: place / "missing" / "target", os.strerror(errno.ENOENT)),
    "under a file": (under_a_file, os.strerror(errno.ENOTDIR)),
    "a dangling link": (dangling, "cannot be created"),
    "a fifo": (fifo, "neither a regular file nor a block device"),
    "a character device": (lambda place, disk: "/dev/zero", "neither a regular file nor a block device"),
    "no name": (lambda place, disk: "", os.strerror(errno.ENOENT)),
    "a name with NUL": (lambda place, disk: str(place / "a\0b"), "(?i)nul"),
    "a name too long": (lambda place, disk: place / ("x" * 256), os.strerror(errno.ENAMETOOLONG)),
}


@pytest.mark.parametrize(("make", "why"), BAD_TARGETS.values(), ids=BAD_TARGETS.keys())
def test_a_bad_target_is_refused(disk, place, unchanged, make, why):
    target = make(place, disk)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=why):
        disk.snapshot(target)
    disk.pwrite(b"goes on", 0)


@pytest.mark.parametrize("target", [5, 1.5, True, [], object()], ids=repr)
def test_a_target_is_a_path(disk, unchanged, target):
    with unchanged(disk), pytest.raises((TypeError, cbwcore.ConfigError)):
        disk.snapshot(target)


def test_a_target_held_by_a_snapshot_is_refused(disk, armed, make_disk, unchanged):
    other = make_disk(SIZE, "other.img")
    for taker in (disk, other):
        with unchanged(disk, other), pytest.raises(cbwcore.ConfigError, match=r"armed.img is in use"):
            taker.snapshot(armed.target)
    armed.close()
    other.snapshot(armed.target).close()


def test_a_target_that_is_another_disk_is_refused(disk, make_disk, unchanged):
    other = make_disk(2 * SIZE, "other.img")
    with unchanged(disk, other), pytest.raises(cbwcore.ConfigError, match=r"other.img is in use"):
        disk.snapshot(other.path)


LOCKS = {
    "ofd": "fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('@hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0))",
    "ofd-shared": "fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('@hhqqi', fcntl.F_RDLCK, 0, 0, 0, 0))",
    "posix": "fcntl.lockf(f, fcntl.LOCK_EX)",
    "one byte, as QEMU": "fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('@hhqqi', fcntl.F_RDLCK, 0, 100, 1, 0))",
    "cbwcore": "f.close(); import cbwcore; d = cbwcore.Disk(sys.argv[1])",
}


@contextlib.contextmanager
def locked_elsewhere(path, statement):
    """Another process that holds a lock on ``path`` while the body runs."""
    before = "import fcntl, struct, sys\nf = open(sys.argv[1], 'r+b')\n"
    code = f"{before}{statement}\nprint('locked', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield
        holder.stdin.close()


@pytest.mark.parametrize("statement", LOCKS.values(), ids=LOCKS.keys())
def test_a_target_held_by_another_process_is_refused(make_disk, make_image, unchanged, statement):
    disk, target = make_disk(SIZE), make_image(SIZE, "target.img")
    refused = pytest.raises(cbwcore.ConfigError, match=r"target .*target\.img is in use")
    with locked_elsewhere(target, statement), unchanged(disk), refused:
        disk.snapshot(target)
    disk.snapshot(target).close()


@pytest.mark.parametrize("statement", LOCKS.values(), ids=LOCKS.keys())
def test_a_disk_held_by_another_process_is_refused(make_image, unchanged, statement):
    path = make_image(SIZE)
    refused = pytest.raises(cbwcore.ConfigError, match=r"disk\.img is in use")
    with locked_elsewhere(path, statement), unchanged(path), refused:
        cbwcore.Disk(path).close()
    cbwcore.Disk(path).close()


def test_a_target_on_a_read_only_mount_is_refused(disk, place, make_image, unchanged, resources, needs):
    (place / "rw").mkdir()
    make_image(SIZE, "rw/old.img")
    with needs():
        read_only = resources.mount(str(place / "rw"), str(place / "ro"), "--bind", "-o", "ro")
    for name in ("old.img", "new.img"):
        with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=os.strerror(errno.EROFS)):
            disk.snapshot(os.path.join(read_only, name))


@pytest.fixture
def immutable(session_resources, resources, needs):
    """A file that even root may not write."""
    path = os.path.join(session_resources.place("ext4"), "immutable")
    with open(path, "wb") as f:
        f.write(b"\xaa" * SIZE)
    resources.undo.callback(os.unlink, path)
    with needs():
        resources.undo.callback(subprocess.run, ["chattr", "-i", path], check=True)
        subprocess.run(["chattr", "+i", path], check=True)
    return path


def test_an_immutable_target_is_refused(disk, unchanged, immutable):
    with unchanged(disk, immutable), pytest.raises(cbwcore.ConfigError, match=os.strerror(errno.EPERM)):
        disk.snapshot(immutable)


def test_an_immutable_disk_is_an_os_error_with_its_path(unchanged, immutable):
    with unchanged(immutable), pytest.raises(PermissionError) as refused:
        cbwcore.Disk(immutable).close()
    assert (refused.value.errno, refused.value.filename) == (errno.EPERM, immutable)
    with cbwcore.Disk(immutable, read_only=True) as disk:
        assert disk.size == SIZE


# ---- targets that are devices ----


@pytest.fixture
def loop_disk(make_image, resources, needs):
    """A disk that is a loop device, the file behind it, and more loop devices on demand."""
    backing = make_image(4 * CLUSTER, "backing.img")
    with needs():
        disk = cbwcore.Disk(resources.loop(backing))
    with disk:
        yield disk


def second_node(place, disk, resources):
    return resources.node(str(place / "node"), os.stat(disk.path).st_rdev)


def second_loop(place, disk, resources):
    return resources.loop(str(place / "backing.img"))


def backing_file(place, disk, resources):
    return str(place / "backing.img")


@pytest.mark.parametrize("alias", [second_node, second_loop, backing_file])
def test_a_loop_device_is_not_its_own_target(loop_disk, place, resources, needs, unchanged, alias):
    """The same bytes by another way would overwrite the disk with its own past."""
    with needs():
        target = alias(place, loop_disk, resources)
    with unchanged(loop_disk), pytest.raises(cbwcore.ConfigError, match="is the disk itself"):
        loop_disk.snapshot(target)


def test_a_loop_device_over_the_disk_file_is_not_its_target(make_disk, resources, needs, unchanged):
    disk = make_disk(4 * CLUSTER)
    with needs():
        target = resources.loop(disk.path)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="is the disk itself"):
        disk.snapshot(target)


def test_a_device_held_by_a_snapshot_is_refused_under_another_node(make_disk, make_image, place, resources, needs):
    disk = make_disk(CLUSTER)
    with needs():
        target = resources.loop(make_image(CLUSTER, "target.img"))
        alias = resources.node(str(place / "node"), os.stat(target).st_rdev)
    with disk.snapshot(target), pytest.raises(cbwcore.ConfigError, match="in use"):
        disk.snapshot(alias)


def test_a_device_held_as_a_disk_is_refused_under_another_node(loop_disk, place, resources, needs):
    with needs():
        alias = second_node(place, loop_disk, resources)
    with pytest.raises(cbwcore.ConfigError, match="in use"):
        cbwcore.Disk(alias).close()


@pytest.mark.parametrize(
    ("size", "options", "why"),
    [
        (CLUSTER, {}, f"{CLUSTER} bytes, less than the disk's {SIZE}"),
        (4 * CLUSTER, {"read_only": True}, "(?i)writ|read-only"),
    ],
    ids=["too-small", "read-only"],
)
def test_a_bad_target_device_is_refused(disk, make_image, resources, needs, unchanged, size, options, why):
    with needs():
        target = resources.loop(make_image(size, "target.img"), **options)
    with unchanged(disk, target), pytest.raises(cbwcore.ConfigError, match=why):
        disk.snapshot(target)


def test_an_unnamed_target_has_no_place_beside_a_device(loop_disk, unchanged):
    with unchanged(loop_disk), pytest.raises(cbwcore.ConfigError, match="name a target"):
        loop_disk.snapshot()


# ---- options ----

CLUSTER_LIMITS = "4096 to 67108864"
POLICIES = "break-guest-write, break-snapshot"
BAD_OPTIONS = [
    *[("cluster_size", v, CLUSTER_LIMITS) for v in (0, -CLUSTER, 1, 512, 2048, 4095, 4097, CLUSTER - 1, CLUSTER + 1)],
    *[("cluster_size", v, CLUSTER_LIMITS) for v in (3 * 4096, 128 << 20, 2**63, 2**64, 2**70, True, False)],
    *[("cluster_size", v, CLUSTER_LIMITS) for v in (65536.0, "65536", None, math.nan, b"65536", [65536])],
    *[
        ("on_cbw_error", v, "break-guest-write, break-snapshot")
        for v in ("", "break", "BREAK-SNAPSHOT", "break_snapshot")
    ],
    *[("on_cbw_error", v, POLICIES) for v in (None, 0, True, b"break-snapshot", ["x"])],
    *[("cbw_timeout", v, "from 0 on") for v in (-1, -0.001, -math.inf, math.nan, "5", None, 1j, [5], -(10**400))],
    *[("target_limit", v, f"0..{2**63 - 1}") for v in (-1, -(2**70), 2**63, 2**64, 2**70, math.nan, math.inf)],
    *[("target_limit", v, "") for v in (1.5, "1000", [], b"1")],
    *[("name", v, "1 to 1023 bytes") for v in ("", "nul\0", "\0", "x" * 1024, "é" * 512, "x" * 10**6)],
    *[("name", v, "") for v in ("\ud800", 5, b"name", ["x"])],
    *[("bitmap", v, "") for v in ("missing", 5, [True] * 4, b"\1\1\1\1", object(), True)],
]


def shown(value):
    text = repr(value)
    return text if len(text) < 30 else f"{text[:12]}...({len(text)})"


@pytest.mark.parametrize(
    ("option", "value", "limit"), BAD_OPTIONS, ids=[f"{option}={shown(value)}" for option, value, _ in BAD_OPTIONS]
)
@pytest.mark.parametrize("target", ["new", "old", "unnamed"])
def test_a_bad_option_is_refused(make_disk, make_image, place, unchanged, option, value, limit, target):
    disk = make_disk(SIZE)
    path = {"new": place / "new.img", "old": make_image(SIZE, "old.img"), "unnamed": None}[target]
    with unchanged(disk), pytest.raises(cbwcore.ConfigError) as refused:
        disk.snapshot(path, **{option: value})
    text = str(refused.value)
    assert limit in text
    if isinstance(value, (int, float)):
        assert option == "bitmap" or str(value) in text or repr(value) in text
    disk.snapshot(path).close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: cbwcore.DirtyBitmap(SIZE - 1),
        lambda: cbwcore.DirtyBitmap(SIZE + 1),
        lambda: cbwcore.DirtyBitmap(0),
        lambda: bitarray.bitarray(3),
        lambda: bitarray.bitarray(5),
        lambda: bitarray.bitarray(),
        lambda: np.ones(3, np.bool_),
        lambda: np.ones(5, np.bool_),
        lambda: np.ones(4, np.uint8),
        lambda: np.ones((4, 1), np.bool_),
        lambda: np.ones((), np.bool_),
    ],
    ids=["bytes-1", "bytes+1", "no-bytes", "bits-1", "bits+1", "no-bits", "bools-1", "bools+1", "uint8", "2-D", "0-D"],
)
def test_a_scope_that_does_not_fit_is_refused(make_disk, place, unchanged, make):
    disk = make_disk(SIZE)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=r"scope"):
        disk.snapshot(place / "new.img", bitmap=make())


@pytest.mark.parametrize(
    ("attribute", "value"),
    [(option, value) for option, value, _ in BAD_OPTIONS if option in ("on_cbw_error", "cbw_timeout")],
    ids=lambda v: shown(v),
)
def test_an_armed_snapshot_refuses_bad_settings(disk, armed, attribute, value):
    before = (armed.on_cbw_error, armed.cbw_timeout)
    with pytest.raises(cbwcore.ConfigError):
        setattr(armed, attribute, value)
    assert (armed.on_cbw_error, armed.cbw_timeout) == before
    assert armed.state == "armed"


def test_unknown_options_are_refused(disk, unchanged):
    with unchanged(disk), pytest.raises(TypeError, match="clustersize"):
        disk.snapshot(clustersize=65536)


# ---- disks ----


def missing(place):
    return place / "missing", FileNotFoundError, errno.ENOENT


def directory(place):
    return place, IsADirectoryError, errno.EISDIR


def below_a_file(place):
    (place / "file").write_bytes(b"")
    return place / "file" / "disk", NotADirectoryError, errno.ENOTDIR


@pytest.mark.parametrize("make", [missing, directory, below_a_file])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_disk_that_cannot_be_opened_is_an_os_error_with_its_path(place, unchanged, make, direct):
    path, kind, code = make(place)
    with unchanged(), pytest.raises(kind) as refused:
        cbwcore.Disk(path, direct=direct).close()
    assert (refused.value.errno, os.fspath(refused.value.filename)) == (code, str(path))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_disk_is_a_file_or_a_block_device(place, unchanged, read_only):
    with unchanged(), pytest.raises(cbwcore.ConfigError, match="neither a regular file nor a block device"):
        cbwcore.Disk("/dev/zero", read_only=read_only).close()
    if read_only:
        with unchanged(), pytest.raises(cbwcore.ConfigError, match="neither a regular file nor a block device"):
            cbwcore.Disk(place, read_only=True).close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_fifo_is_no_disk_and_does_not_hang(place, run_python, read_only):
    """open(2) of a fifo waits for its other end."""
    os.mkfifo(place / "fifo")
    code = """
import cbwcore, sys
try:
    cbwcore.Disk(sys.argv[1], read_only=sys.argv[2] == "True")
except cbwcore.ConfigError as e:
    print(e)
"""
    assert "neither a regular file nor a block device" in run_python(code, place / "fifo", read_only, timeout=5).stdout


@pytest.mark.parametrize("io", ["", "PSYNC", "threads", None, 1])
def test_an_unknown_io_engine_is_refused(make_image, unchanged, io):
    path = make_image(SIZE)
    with unchanged(path), pytest.raises(cbwcore.ConfigError, match=re.escape(repr(io)) + ".*auto, psync, io_uring"):
        cbwcore.Disk(path, io=io).close()


def test_a_disk_is_opened_once_for_writing(disk, unchanged):
    for read_only in (False, True):
        with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="in use"):
            cbwcore.Disk(disk.path, read_only=read_only).close()


@by_name({name: DISK_CALLS[name] for name in ("pwrite", "pwrite fua", "pwrite_zeroes", "discard")})
def test_a_read_only_disk_refuses_guest_writes(make_image, unchanged, call):
    with cbwcore.Disk(make_image(SIZE), read_only=True) as disk, disk.snapshot():
        with unchanged(disk), pytest.raises(PermissionError) as refused:
            call(disk)
        assert (refused.value.errno, refused.value.filename) == (errno.EPERM, disk.path)
        assert disk.stats().guest_writes == 0


# ---- bitmaps ----


@pytest.mark.parametrize("granularity", [0, -512, 1, 256, 511, 513, 65535, 2**32, 2**64, 65536.0, "65536", None, True])
def test_a_bitmap_of_bad_granularity_is_refused(disk, unchanged, granularity):
    with unchanged(disk):
        with pytest.raises(cbwcore.ConfigError, match=rf"granularity {granularity}.*512 to {2**31}"):
            disk.bitmaps.add("bad", granularity=granularity)
        with pytest.raises(cbwcore.ConfigError, match="granularity"):
            cbwcore.DirtyBitmap(SIZE, granularity)


@pytest.mark.parametrize("size", [-1, 2**63, 2**70])
def test_a_bitmap_of_bad_size_is_refused(size):
    with pytest.raises(cbwcore.ConfigError, match=str(size)):
        cbwcore.DirtyBitmap(size)


@pytest.mark.parametrize("name", ["", "nul\0", "x" * 1024, "\ud800", 5, None])
def test_a_bitmap_of_bad_name_is_refused(disk, unchanged, name):
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="name"):
        disk.bitmaps.add(name)


def test_a_bitmap_name_is_used_once(disk, unchanged):
    disk.bitmaps.add("a")
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="'a'"):
        disk.bitmaps.add("a")
    with unchanged(disk), pytest.raises(KeyError, match="b"):
        disk.bitmaps.remove("b")


BITMAP_RANGES = {
    "set_range": lambda b, offset: b.set_range(offset, 1),
    "is_dirty": lambda b, offset: b.is_dirty(offset),
    "ranges": lambda b, offset: list(b.ranges(offset)),
}


@by_name(BITMAP_RANGES)
@pytest.mark.parametrize("offset", [-1, -(2**64), SIZE + 1, 2**63, 2**64, 2**70])
def test_a_range_outside_a_bitmap_is_refused(call, offset):
    bitmap = cbwcore.DirtyBitmap(SIZE)
    with pytest.raises(cbwcore.ConfigError, match=str(offset)):
        call(bitmap, offset)
    assert bitmap.count() == 0


@pytest.mark.parametrize("length", [-1, SIZE + 1, 2**63, 2**64])
def test_a_length_outside_a_bitmap_is_refused(length):
    bitmap = cbwcore.DirtyBitmap(SIZE)
    with pytest.raises(cbwcore.ConfigError, match=str(length)):
        bitmap.set_range(0, length)
    assert bitmap.count() == 0


@pytest.mark.parametrize("other", [None, 5, "name", bitarray.bitarray(4), np.ones(4, np.bool_)], ids=shown)
def test_a_bitmap_merges_bitmaps_alone(other):
    bitmap = cbwcore.DirtyBitmap(SIZE)
    with pytest.raises((TypeError, cbwcore.ConfigError)):
        bitmap.merge(other)


def test_a_bitmap_of_another_size_is_not_merged_nor_any_beside_it():
    into, fits, other = cbwcore.DirtyBitmap(SIZE), cbwcore.DirtyBitmap(SIZE), cbwcore.DirtyBitmap(SIZE + 1)
    fits.set_range(0, 1)
    with pytest.raises(cbwcore.ConfigError, match=f"{SIZE + 1} bytes, not {SIZE}"):
        into.merge(fits, other)
    assert into.count() == 0


def test_a_bitmap_without_a_disk_cannot_record():
    with pytest.raises(cbwcore.ConfigError, match="no disk"):
        cbwcore.DirtyBitmap(SIZE).enable()


# ---- the file object ----


@pytest.mark.parametrize(
    ("offset", "whence", "why"),
    [(-1, 0, "-1"), (-7, 1, "-7"), (-SIZE - 9, 2, "-9"), (0, 3, "whence 3"), (0, -1, "whence -1")],
)
def test_a_file_refuses_bad_positions(armed, offset, whence, why):
    with armed.open() as file:
        with pytest.raises(cbwcore.ConfigError, match=why):
            file.seek(offset, whence)
        assert file.tell() == 0


@pytest.mark.parametrize("offset", [1.5, "0", None], ids=repr)
def test_a_file_position_is_an_integer(armed, offset):
    with armed.open() as file:
        with pytest.raises((TypeError, cbwcore.ConfigError)):
            file.seek(offset)
        assert file.tell() == 0


def test_a_file_is_read_only(armed):
    with armed.open() as file:
        assert not file.writable()
        for write in (lambda: file.write(b"x"), lambda: file.truncate(0), lambda: file.fileno()):
            with pytest.raises((OSError, NotImplementedError)):
                write()
        with pytest.raises((TypeError, cbwcore.ConfigError)):
            file.readinto(b"read-only")
