"""The system refuses memory, threads and rings, at every call of the core one after the other (R19): nobody crashes or
hangs, what fails says so, and the next try succeeds. refuse.c does the refusing, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_support import G, S

from cbwcore._cbwcore import io_uring_state

SOURCE = Path(__file__).with_name("refuse.c")
BUILT, REFUSED = io_uring_state()
ring = pytest.mark.skipif(not BUILT or REFUSED != 0, reason="this build, or this kernel, has no io_uring")
pytestmark = pytest.mark.skipif(bool(os.environ.get("CBWCORE_SANITIZER")), reason="a sanitizer has its own malloc()")

PROLOGUE = """
import ctypes, errno, os, sys, threading
import cbwcore
from cbwcore._cbwcore import FaultPlan, copy_buffers

lib = ctypes.CDLL(None)
path, policy, io = sys.argv[1:4]
C = 65536
MEMORY = ("calloc", "malloc", "posix_memalign", "mmap64")
MEMORY += ("pthread_create", "pthread_attr_init", "pthread_condattr_init")
T0 = os.urandom(16 * C)


def refuse(name, skip=0, times=1, code=errno.ENOMEM):
    lib.refuse(name.encode(), ctypes.c_long(skip), ctypes.c_long(times), code)


allow = lib.allow
allow.restype = ctypes.c_long


def fill():
    with open(path, "wb") as f:
        f.write(T0)


def sweep(names, call):
    '''call(name, nth) with the 1st, 2nd, ... of each kind of call refused, until it makes no more of them.'''
    tried = 0
    for name in names:
        for nth in range(200):
            refuse(name, nth)
            call(name, nth)
            if allow() == 0:
                break
            tried += 1
    assert tried, "nothing was refused"


fill()
"""

SCENES = {
    "a disk is opened": """
def call(name, nth):
    try:
        disk = cbwcore.Disk(path, io=io)
    except (MemoryError, OSError):
        disk = None
    if disk is not None:
        assert disk.pread(16 * C, 0) == T0
        disk.close()

sweep(MEMORY, call)
cbwcore.Disk(path, io=io).close()
""",
    "a snapshot is taken": """
with cbwcore.Disk(path, io=io) as disk, disk.snapshot(cluster_size=4096) as old:
    now, copied = bytearray(T0), []

    def write():
        copied.append(old.stats().cbw_copies)           # into a cluster that was not written yet
        disk.pwrite(b"n", 4096 * copied[-1])
        now[4096 * copied[-1]] = ord("n")
        assert old.stats().cbw_copies == copied[-1] + 1

    def whole():
        assert old.state == "armed" and old.pread(16 * C, 0) == T0 and disk.pread(16 * C, 0) == now

    def call(name, nth):
        try:
            snap = disk.snapshot(on_cbw_error=policy, cbw_timeout=30)
        except (MemoryError, OSError):
            assert disk.snapshots == (old,)
            refuse(name, 0, 1 << 30)                    # and all that come
            whole()
            try:
                write()
            except cbwcore.CopyBeforeWriteError as e:
                assert e.errno == errno.ENOMEM
            whole()
        else:
            assert snap.pread(C, 0) == now[:C]
            snap.close()

    sweep(MEMORY, call)
    write()
    whole()
    assert len(set(copied)) > 3, "hardly any write was let through"
    with disk.snapshot() as snap:
        disk.pwrite(b"o", 0)
        assert snap.pread(C, 0) == now[:C]
assert copy_buffers()[3] == 0
""",
    "a timeout is set": """
with cbwcore.Disk(path, io=io) as disk, disk.snapshot(on_cbw_error=policy) as snap:
    refuse("pthread_create", code=errno.EAGAIN)
    try:
        snap.cbw_timeout = 5.0
    except OSError as e:
        assert e.errno == errno.EAGAIN
    else:
        raise AssertionError
    assert allow() == 1
    snap.cbw_timeout = 5.0
    disk.pwrite(b"n", 0)
    assert snap.pread(C, 0) == T0[:C]
""",
    "a copy is made": """
def call(name, nth):
    fill()
    cbwcore.limits.copy_buffers = 128 << 20         # buffers at rest go back to the system
    with cbwcore.Disk(path, io=io) as disk:
        snaps = [disk.snapshot(on_cbw_error=policy, cbw_timeout=timeout) for timeout in timeouts]
        allow()
        refuse(name, nth)
        try:
            disk.pwrite(b"n" * 4096, 3 * C - 100)
        except cbwcore.CopyBeforeWriteError as e:
            assert policy == "break-guest-write" and e.errno == errno.ENOMEM, e
            assert disk.pread(16 * C, 0) == T0
            disk.pwrite(b"n" * 4096, 3 * C - 100)
        for snap in snaps:
            if snap.state == "armed":
                assert snap.pread(16 * C, 0) == T0
            else:
                assert policy == "break-snapshot" and snap.error.errno == errno.ENOMEM
        assert disk.pread(4096, 3 * C - 100) == b"n" * 4096
        return allow()

tried = 0
for timeouts in ((0,), (30,), (0, 0)):
    for name in ("calloc", "malloc", "posix_memalign", "pthread_create"):
        for nth in range(50):
            hits = call(name, nth)
            tried += hits
            if not hits:
                break
assert tried
""",
    "bitmaps are made, read from a file and brought to memory": """
with cbwcore.Disk(path, io=io) as disk:
    def call(name, nth):
        try:
            bitmap = disk.bitmaps.add("b", granularity=4096)
        except (MemoryError, OSError):
            return
        disk.pwrite(b"n", 0)
        assert bitmap.count() == 4096
        try:
            bitmap.clear()
        except MemoryError:
            assert bitmap.count() == 4096
        else:
            assert bitmap.count() == 0
        disk.bitmaps.remove("b")

    sweep((*MEMORY, "madvise"), call)

    with open(path + ".bits", "wb") as f:
        f.write(bytes(4096))
    def map_and_back(name, nth):
        try:
            bitmap = cbwcore.DirtyBitmap(16 * C, granularity=4096)
        except MemoryError:
            return
        with open(path + ".bits", "r+b") as f:
            try:
                bitmap._map_file(f.fileno(), 0)
            except OSError as e:
                assert e.errno == errno.ENOMEM
                return
        bitmap.set_range(C, C)
        try:
            bitmap._unmap_file()
        except OSError as e:
            assert e.errno == errno.ENOMEM
            assert bitmap.count() == C
            bitmap._unmap_file()
        assert bitmap.count() == C

    sweep(("mmap64", "mremap"), map_and_back)
""",
    "a direct disk is used off its blocks": """
def call(name, nth, first):
    fill()
    with cbwcore.Disk(path, io=io, direct=True) as disk:
        allow()
        refuse(name, nth)
        for use in (lambda: disk.pwrite(b"n" * 10_000, 100), lambda: disk.pread(10_000, 100))[::first]:
            try:
                use()
            except OSError as e:
                assert e.errno == errno.ENOMEM
        hits = allow()
        disk.pwrite(b"n" * 10_000, 100)
        assert disk.pread(10_200, 0) == T0[:100] + b"n" * 10_000 + T0[10_100:10_200]
        return hits

try:
    cbwcore.Disk(path, io=io, direct=True).close()
except cbwcore.ConfigError:
    print("right")
    sys.exit()
for first in (1, -1):           # the other way round: buffers are kept
    nth = 0
    while call("posix_memalign", nth, first):
        nth += 1
    assert nth
""",
    "an NBD server and its connections are made": """
import socket
from cbwcore.nbd import NbdServer
from cbwcore._cbwcore import NbdConnectionCore, NbdCore

fits = dict(bytes_in_flight=64 << 20, connections=4, max_request=1 << 20, max_drain=1 << 20, max_extents=100)
fits["stall_seconds"] = 5.0
how = dict(contexts=(), read_only=True, discard=False, structured=False)
with cbwcore.Disk(path, io=io) as disk, disk.snapshot() as snap:
    def call(name, nth):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(READ + DISC)
            ours.shutdown(socket.SHUT_WR)
            try:
                server = NbdCore(**fits)
                end = NbdConnectionCore(server, snap, **how).serve(theirs.fileno())
            except (MemoryError, OSError):
                return
            assert end == "disconnected by the client", (name, nth, end)
            theirs.shutdown(socket.SHUT_WR)
            answer = ours.makefile("rb").read()
            assert answer[:16] == ANSWER and len(answer) == 16 + 3000 and answer[16:] == T0[5:3005]

    READ = bytes.fromhex("25609513 0000 0000 0000000000000001 0000000000000005 00000bb8")
    DISC = bytes.fromhex("25609513 0000 0002 0000000000000002 0000000000000000 00000000")
    ANSWER = bytes.fromhex("67446698 00000000 0000000000000001")
    sweep((*MEMORY, "epoll_create1", "eventfd", "epoll_ctl"), call)
""",
    "a plan of faults is made": """
def call(name, nth):
    try:
        plan = FaultPlan()
        plan.calls()
    except MemoryError:
        pass

sweep(("calloc", "malloc", "pthread_condattr_init"), call)
""",
}

RINGS = {
    "an old kernel has no such rings": "refuse('io_uring_queue_init_params', 0, 1, errno.EINVAL)",
    "no ring is to be had": "refuse('io_uring_queue_init_params', 0, 1 << 30, errno.ENOMEM)",
    "there is no memory for a ring": "if timeout == 0: refuse('calloc', 0, 1); disk.pread(1, 0)",
    "no buffer may be registered": "refuse('io_uring_register_buffers', 0, 1 << 30)",
    "the kernel is short of memory for a request": "refuse('io_uring_submit_and_wait', 1, 3, errno.EAGAIN)",
    "submitting is interrupted": "refuse('io_uring_submit_and_wait', 1, 3, errno.EINTR)",
    "the ring is of no use any more": "refuse('io_uring_submit_and_wait', 1, 1, errno.EBADF)",
    "submitting does not wait, and waiting is interrupted": "refuse('io_uring_submit_and_wait', 1, 3, errno.EINTR)",
}
USE_RINGS = """
cbwcore.limits.polling_threads = 0
def use(timeout):
    fill()
    with cbwcore.Disk(path, io="io_uring") as disk, disk.snapshot(on_cbw_error=policy, cbw_timeout=timeout) as snap:
        if not hits:
            REFUSE
        for c in range(16):
            disk.pwrite(b"n" * 5000, c * C + 7)
            assert disk.pread(5000, c * C + 7) == b"n" * 5000
        assert snap.pread(16 * C, 0) == T0
        assert snap.state == "armed"

for timeout in (0, 30):
    # a thread of its own has no ring yet
    def run():
        use(timeout)
        hits.append(allow())
        use(timeout)
        done.append(timeout)
    hits, done = [], []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert done == [timeout]
    total = hits[0] + (globals().get("total") or 0)
assert total
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """refuse.c, built."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    path = tmp_path_factory.mktemp("refuse") / "refuse.so"
    linked = ["-Wl,--no-as-needed", "-luring"] if BUILT else []  # so that what refuse.c stands before is in its scope
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, SOURCE, *linked], check=True)
    return path


@pytest.fixture
def run_refused(library, place):
    """``run_refused(program, policy, io)``: it must end well, with refuse.c before libc."""

    def run_refused(program, *args):
        whole = PROLOGUE + program + "\nprint('right')"
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", whole, place / "disk", *args],
            env=os.environ | {"LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-4000:]

    return run_refused


@pytest.mark.parametrize("io", ["psync", pytest.param("io_uring", marks=ring)])
@pytest.mark.parametrize("policy", [G, S])
@pytest.mark.parametrize("scene", SCENES)
def test_memory_and_threads_are_refused_while(run_refused, scene, policy, io):
    run_refused(SCENES[scene], policy, io)


@ring
@pytest.mark.parametrize("policy", [G, S])
@pytest.mark.parametrize("scene", RINGS)
def test_the_data_are_right_though(run_refused, scene, policy):
    run_refused(USE_RINGS.replace("REFUSE", RINGS[scene]), policy, "io_uring")
