"""The I/O engines: which one a file gets, and io_uring where rings are scarce, lost or of another process."""

import errno
import logging
import os
import subprocess
import sys

import pytest

import cbwcore
from cbwcore import engines
from cbwcore._cbwcore import io_uring_state
from cbwcore.cli import main

BUILT, REFUSED = io_uring_state()
MIB = 1 << 20

ring = pytest.mark.skipif(not BUILT or REFUSED != 0, reason="this build, or this kernel, has no io_uring")


@pytest.fixture
def kernel(monkeypatch):
    """Let build and kernel be what a test says."""
    return lambda built, refused: monkeypatch.setattr(engines, "io_uring_state", lambda: (built, refused))


@pytest.mark.parametrize(
    ("io", "direct", "state", "engine"),
    [
        ("psync", True, (True, 0), "psync"),
        ("auto", False, (True, 0), "psync"),
        ("auto", True, (True, 0), "io_uring"),
        ("auto", True, (False, 0), "psync"),
        ("auto", True, (True, errno.EPERM), "psync"),
        ("io_uring", False, (True, 0), "io_uring"),
    ],
)
def test_the_engine_of_a_file(kernel, io, direct, state, engine):
    kernel(*state)
    assert engines.choose_engine(io, direct=direct)[0] == engine


@pytest.mark.parametrize(
    ("state", "text"), [((False, 0), "liburing was not found"), ((True, errno.EPERM), "Operation not permitted")]
)
def test_io_uring_is_refused_where_there_is_none(kernel, tmp_path, capsys, state, text):
    kernel(*state)
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    with pytest.raises(cbwcore.ConfigError, match=text):
        cbwcore.Disk(path, io="io_uring")
    assert main(["serve", str(path), "--socket", str(tmp_path / "s"), "--io", "io_uring"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert text in told[0]


def test_auto_tells_the_log_why_a_direct_disk_has_psync(kernel, monkeypatch, tmp_path, caplog):
    kernel(True, errno.EPERM)
    monkeypatch.setattr("cbwcore.disk.choose_engine", engines.choose_engine)  # whatever CBWCORE_TEST_IO says
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    caplog.set_level(logging.INFO, "cbwcore.disk")
    try:
        disk = cbwcore.Disk(path, direct=True)
    except cbwcore.ConfigError:
        pytest.skip("no O_DIRECT here")
    with disk:
        assert disk.io == "psync"
    assert "the kernel allows no io_uring" in caplog.text


# Each runs in a process of its own, with a disk over io_uring whose snapshot must stay right throughout.
PROLOGUE = """
import os, resource, sys, threading
import cbwcore

def rings():
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "io_uring" in os.readlink(f"/proc/self/fd/{fd}"):
                names.append(int(fd))
        except OSError:
            pass
    return names

def in_thread(call, *args):
    failed = []
    def run():
        try:
            call(*args)
        except BaseException as e:
            failed.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and not failed, failed

C = 65536
path = sys.argv[1]
t0 = os.urandom(32 * C)
with open(path, "wb") as f:
    f.write(t0)
disk = cbwcore.Disk(path, io="io_uring")
snap = disk.snapshot(cbw_timeout=float(sys.argv[2]))

def use(clusters):
    for c in clusters:
        disk.pwrite(b"new" * 1000, c * C + 5)
        assert disk.pread(3000, c * C + 5) == b"new" * 1000
    assert snap.pread(len(t0), 0) == t0
    assert snap.stats().cbw_copies >= len(clusters)
"""
EPILOGUE = """
snap.close()
disk.close()
print("right")
"""
SCENES = {
    "no ring is to be had": """
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), limit[1]))
use(range(8))
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
assert rings() == []
use(range(8, 16))
assert len(rings()) >= 1
""",
    "somebody has closed the ring": """
use(range(4))
for fd in rings():
    os.close(fd)
use(range(4, 8))
use(range(8, 12))
""",
    "somebody has the ring's number": """
use(range(4))
other = os.open("/dev/null", os.O_RDWR)
for fd in rings():
    os.dup2(other, fd)
use(range(4, 8))
use(range(8, 12))
""",
    "threads come and go": """
for c in range(32):
    in_thread(use, [c])
together = [threading.Thread(target=use, args=([c],)) for c in range(32)]
for thread in together:
    thread.start()
for thread in together:
    thread.join()
assert len(rings()) <= 17, rings()
for c in range(32):
    in_thread(use, [c])
assert len(rings()) <= 17, rings()
""",
    "a forked child has rings of its own": """
use(range(4))
child = os.fork()
if child == 0:
    status = 1
    try:
        other = path + ".child"
        with open(other, "wb") as f:
            f.write(t0)
        with cbwcore.Disk(other, io="io_uring") as mine, mine.snapshot() as copy:
            mine.pwrite(b"child" * 1000, 0)
            assert copy.pread(len(t0), 0) == t0
            assert mine.pread(5000, 0) == b"child" * 1000
        status = 0
    finally:
        os._exit(status)
use(range(4, 8))
assert os.waitpid(child, 0)[1] == 0
use(range(8, 12))
""",
}


@ring
@pytest.mark.parametrize("timeout", [0, 30])
@pytest.mark.parametrize("scene", SCENES)
def test_the_data_are_right_when(tmp_path, scene, timeout):
    program = PROLOGUE + SCENES[scene] + EPILOGUE
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "disk"), str(timeout)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@ring
@pytest.mark.parametrize("direct", [False, True])
def test_a_request_of_many_pieces_is_whole(tmp_path, direct):
    """More than one submission takes: 2 MiB in pieces of 256 KiB; and a piece that is cut short ends the attempt."""
    t0 = os.urandom(9 * MIB + 12_345)
    path = tmp_path / "disk"
    path.write_bytes(t0)
    try:
        disk = cbwcore.Disk(path, io="io_uring", direct=direct)
    except cbwcore.ConfigError:
        pytest.skip("no O_DIRECT here")
    new = os.urandom(7 * MIB + 777)
    with disk, disk.snapshot() as snap:
        disk.pwrite(new, 4096)
        assert disk.pread(len(new), 4096) == new
        assert snap.pread(len(t0), 0) == t0
    assert path.read_bytes() == t0[:4096] + new + t0[4096 + len(new) :]


CUT_SHORT = """
import errno, os, resource, sys
import cbwcore

path, io, MIB = sys.argv[1], sys.argv[2], 1 << 20
with open(path, "wb") as f:
    f.write(bytes(4 * MIB))
limit = 2 * MIB + 100_000
disk = cbwcore.Disk(path, io=io)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    disk.pwrite(b"n" * (3 * MIB), MIB // 2)
except OSError as e:
    print(errno.errorcode[e.errno])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
disk.pwrite(b"z" * (3 * MIB), MIB)
assert disk.pread(3 * MIB, MIB) == b"z" * (3 * MIB)
assert disk.pread(MIB, 0) == bytes(MIB // 2) + b"n" * (MIB // 2)
disk.close()
"""


@pytest.mark.parametrize("io", ["psync", pytest.param("io_uring", marks=ring)])
def test_a_write_that_the_system_cuts_short_fails_with_its_error(tmp_path, io):
    """RLIMIT_FSIZE ends it in the middle of a piece, and the pieces after it fail: the same for every engine (R12)."""
    done = subprocess.run(
        [sys.executable, "-c", CUT_SHORT, str(tmp_path / "disk"), io],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "EFBIG\n"), done.stderr


@ring
def test_a_deadline_ends_with_the_copy(tmp_path):
    """What the thread does next may take as long as it likes, also by calls that no deadline can end."""
    path = tmp_path / "disk"
    path.write_bytes(b"t" * MIB)
    with cbwcore.Disk(path, io="io_uring") as disk, disk.snapshot(cbw_timeout=30) as snap:
        disk.pwrite_zeroes(0, 65536)
        disk.discard(65536, 65536)
        disk.pwrite(b"n", 0)
        assert disk.pread(65536, 0) == b"n" + bytes(65535)
        assert snap.pread(MIB, 0) == b"t" * MIB


@ring
@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_zeroes_into_a_target_that_has_something_there_are_copied_by_a_helper(tmp_path, policy):
    """To ask for holes, and to make one, are calls that no deadline can end (R8): the guest's thread does neither."""
    path, target = tmp_path / "disk", tmp_path / "target"
    path.write_bytes(bytes(MIB))
    target.write_bytes(b"g" * MIB)
    with (
        cbwcore.Disk(path, io="io_uring") as disk,
        disk.snapshot(target, cbw_timeout=30, on_cbw_error=policy) as snap,
    ):
        disk.pwrite(b"n" * 70_000, 100)
        assert disk.pread(70_000, 100) == b"n" * 70_000
        assert snap.pread(MIB, 0) == bytes(MIB)
        assert snap.state == "armed"
    assert target.read_bytes()[:131072] == bytes(131072)
