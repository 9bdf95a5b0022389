"""The fault table from outside: storage that fails, fills up, hangs or goes read-only for real, under both policies and
both engines. What each must come to is said once, in `Case`.

The storage is a file over FUSE whose server (nbdkit) fails, delays or is stopped on demand, or a small file system."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engine_support import CLUSTER, G, S, assert_broken, assert_refused, file_bytes, pattern, until
from interop_support import LIMIT, listens, nbdfuse, stop_process
from programs_support import need

import cbwcore
from cbwcore.engines import choose_engine

SIZE = 4 * CLUSTER
OFFSET = CLUSTER + 4096  # the guest's write; cluster 1 is what it needs
RUN = (CLUSTER, CLUSTER)
NEW = b"n" * 8192
TIMEOUT = 0.5


@pytest.fixture(params=["psync", "io_uring"])
def engine(request):
    """Options of a disk: psync buffered, io_uring with O_DIRECT, as they are used by default."""
    direct = request.param == "io_uring"
    if direct and choose_engine("io_uring", direct=True)[0] != "io_uring":
        pytest.skip("no io_uring here")
    return {"io": request.param, "direct": direct}


@pytest.fixture(params=[G, S])
def policy(request):
    return request.param


class Storage:
    """A file over FUSE. Its server fails requests while the file `trigger` is there, and can be stopped."""

    def __init__(self, resources, content, *arguments):
        self.folder = Path(resources.directory())
        self.image = self.folder / "image"
        self.image.write_bytes(content)
        self.trigger = self.folder / "trigger"
        address = self.folder / "socket"
        names = {"TRIGGER": str(self.trigger), "IMAGE": str(self.image)}
        for name, path in names.items():
            arguments = [argument.replace(name, path) for argument in arguments]
        filters = [a for a in arguments if a.startswith("--filter")]
        settings = [a for a in arguments if not a.startswith("--filter")]
        if "eval" not in settings:
            settings = ["file", str(self.image), *settings]
        self.server = subprocess.Popen(["nbdkit", "-f", "-U", address, *filters, *settings])
        resources.undo.callback(self.end)
        until(lambda: listens(address), "nbdkit listens")
        self.path = nbdfuse(resources, f"nbd+unix:///?socket={address}", str(self.folder / "fuse"))

    def fail(self):
        self.trigger.touch()

    def mend(self):
        self.trigger.unlink(missing_ok=True)

    def stop(self):
        stop_process(self.server.pid)

    def go_on(self):
        self.server.send_signal(signal.SIGCONT)

    def end(self):
        if self.server.poll() is None:
            self.go_on()
            self.server.terminate()
        self.server.wait(LIMIT)


@pytest.fixture
def storage(resources):
    need("nbdkit", "nbdfuse", "fusermount3")

    def storage(content, *arguments):
        try:
            return Storage(resources, content, *arguments)
        except RuntimeError as e:
            pytest.skip(str(e))

    return storage


class Case:
    """A disk with a snapshot, one guest write that meets the fault, and what must come of it."""

    def __init__(self, disk_path, target, engine, policy, undo, **options):
        self.t0 = file_bytes(disk_path)
        self.policy = policy
        self.disk = cbwcore.Disk(disk_path, **engine)
        undo.callback(self.disk.close)
        self.told = []
        self.snap = self.disk.snapshot(target, on_cbw_error=policy, on_break=self.told.append, **options)

    def write(self):
        self.disk.pwrite(NEW, OFFSET)

    def fails(self, code, operation, call=None):
        """As the policy has it: the write is refused and nothing changed, or it is done and the snapshot is gone."""
        call = call or self.write
        stats = self.snap.stats()
        if self.policy == G:
            assert_refused(call, code, operation, *RUN)
            self.is_as_before()
        else:
            call()
            assert self.content() == self.written()
            assert self.told == [self.snap]
            assert_broken(self.snap, code, operation, *RUN)
        after = self.snap.stats()
        late = operation == "timeout"
        assert (after.cbw_copies, after.timeouts - stats.timeouts) == (stats.cbw_copies, int(late))
        assert late or after.cbw_failures == stats.cbw_failures + 1

    def is_as_before(self):
        assert self.content() == self.t0
        assert (self.snap.state, self.snap.error, self.told) == ("armed", None, [])
        assert not any(self.snap._map("done"))
        assert all(self.snap._map("need"))

    def snapshot_is_t0(self):
        assert self.snap.pread(self.snap.size, 0) == self.t0

    def content(self):
        return self.disk.pread(self.disk.size, 0)

    def written(self):
        return self.t0[:OFFSET] + NEW + self.t0[OFFSET + len(NEW) :]

    def works_again(self, failures=1):
        """The fault is over: the next write succeeds, and copies where the snapshot is still there."""
        self.write()
        assert self.content() == self.written()
        self.disk.flush()
        if self.policy == G:
            self.snapshot_is_t0()
            assert self.snap.stats().cbw_copies == 1
            assert self.snap.stats().cbw_failures == failures
        else:
            stats = self.snap.stats()
            assert (self.snap.state, stats.cbw_copies) == ("broken", 0)
            assert stats.cbw_failures == min(failures, 1), "after the break nothing is copied"
            assert len(self.told) == 1
            with pytest.raises(cbwcore.SnapshotBrokenError):
                self.snap.pread(1, 0)


@pytest.fixture
def undo():
    with contextlib.ExitStack() as undo:
        yield undo


@pytest.fixture
def local(place):
    """A path on tmpfs, as a disk or a new target."""

    def local(name, content=None):
        path = place / name
        if content is not None:
            path.write_bytes(content)
        return path

    return local


# ---- errors ----


def test_target_write_error(storage, local, engine, policy, undo):
    target = storage(bytes(SIZE), "--filter=error", "error-pwrite=EIO", "error-pwrite-rate=100%", "error-file=TRIGGER")
    case = Case(local("disk", pattern(SIZE)), target.path, engine, policy, undo)
    target.fail()
    case.fails(errno.EIO, "target-write")
    if policy == G:
        case.snapshot_is_t0()  # while the target is still bad: none of it is there
        case.fails(errno.EIO, "target-write")
    target.mend()
    case.works_again(failures=2)


def test_source_read_error(storage, local, engine, policy, undo):
    source = storage(pattern(SIZE), "--filter=error", "error-pread=EIO", "error-pread-rate=100%", "error-file=TRIGGER")
    case = Case(source.path, local("target"), engine, policy, undo)
    case.content = lambda: file_bytes(source.image)  # the disk cannot be read by itself
    source.fail()
    case.fails(errno.EIO, "source-read")
    if policy == G:
        with pytest.raises(OSError, match="Input/output"):
            case.snap.pread(1, 0)
        assert (case.snap.state, case.snap.error) == ("armed", None)
    source.mend()
    if policy == G:
        case.snapshot_is_t0()
    case.works_again()


def test_disk_write_error_after_the_copy(storage, local, engine, policy, undo):
    disk = storage(pattern(SIZE), "--filter=error", "error-pwrite=EIO", "error-pwrite-rate=100%", "error-file=TRIGGER")
    case = Case(disk.path, local("target"), engine, policy, undo)
    disk.fail()
    with pytest.raises(OSError, match="Input/output") as e:
        case.write()
    assert not isinstance(e.value, cbwcore.CbwError)
    assert (e.value.errno, e.value.filename) == (errno.EIO, disk.path)
    assert case.content() == file_bytes(disk.image) == case.t0
    assert (case.snap.state, case.snap.error, case.told) == ("armed", None, [])
    assert case.snap._map("done") == [False, True, False, False]
    stats = case.snap.stats()
    assert (stats.cbw_copies, stats.cbw_failures) == (1, 0)
    case.snapshot_is_t0()
    disk.mend()
    case.write()
    assert case.content() == case.written()
    case.snapshot_is_t0()
    stats = case.snap.stats()
    assert (stats.cbw_copies, stats.cbw_failures) == (1, 0)


FLUSH_FAILS = [  # the error filter has no flushes
    "eval",
    "get_size=stat -c %s IMAGE",
    "pread=dd if=IMAGE iflag=skip_bytes,count_bytes skip=$4 count=$3",
    "pwrite=dd of=IMAGE oflag=seek_bytes conv=notrunc seek=$4",
    "can_write=exit 0",
    "can_flush=exit 0",
    "flush=if [ -e TRIGGER ]; then echo EIO failed >&2; exit 1; fi",
]


def test_flush_error_of_the_disk_is_for_good(storage, local, engine, policy, undo):
    """fsync is never tried again: what it has lost it does not tell twice (R14). The snapshot does not mind."""
    disk = storage(pattern(SIZE), *FLUSH_FAILS)
    case = Case(disk.path, local("target"), engine, policy, undo)
    case.write()
    disk.fail()
    with pytest.raises(OSError, match="Input/output") as e:
        case.disk.flush()
    assert not isinstance(e.value, cbwcore.CbwError)
    assert (e.value.errno, e.value.filename) == (errno.EIO, disk.path)

    def nothing_else_has_failed():
        stats = case.snap.stats()
        assert (stats.cbw_copies, stats.cbw_failures) == (1, 0)
        assert (case.snap.state, case.snap.error, case.told) == ("armed", None, [])
        assert case.content() == file_bytes(disk.image) == case.written()
        case.snapshot_is_t0()

    nothing_else_has_failed()
    disk.mend()
    with pytest.raises(OSError, match="Input/output"):
        case.disk.flush()
    with pytest.raises(OSError, match="Input/output"):
        case.disk.pwrite(NEW, OFFSET, fua=True)
    case.write()
    nothing_else_has_failed()


# ---- a target that is late ----


def late(write):
    """It takes the timeout, and little more; a busy machine gets a part of a second beside."""
    before = time.monotonic()
    try:
        return write()
    finally:
        took = time.monotonic() - before
        assert TIMEOUT <= took < TIMEOUT * 1.1 + 1.0


@pytest.mark.parametrize("how", ["stopped", "slow"])
def test_target_slower_than_the_timeout(storage, local, engine, policy, undo, how):
    arguments = ["--filter=delay", "wdelay=1500ms"] if how == "slow" else []
    target = storage(bytes(SIZE), *arguments)
    case = Case(local("disk", pattern(SIZE)), target.path, engine, policy, undo, cbw_timeout=TIMEOUT)
    if how == "stopped":
        target.stop()
    case.fails(errno.ETIMEDOUT, "timeout", lambda: late(case.write))
    if policy == G:
        case.snapshot_is_t0()  # from the disk, which is not late
    if how == "stopped":
        target.go_on()
    if policy == S:
        closer = threading.Thread(target=case.snap.close)
        closer.start()
        closer.join(LIMIT)
        assert not closer.is_alive(), "close() waits for the late copy, and no longer"
        assert case.snap.error.errno == errno.ETIMEDOUT
        case.write()
        assert case.content() == case.written()
        return
    until(lambda: case.snap.stats().cbw_copies == 1, "the late copy ends, and counts")
    case.works_again(failures=0)


# ---- a target that is full, or may not grow ----


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request, resources, needs):
    """A file system of about 1 MiB."""
    with needs():
        if request.param == "tmpfs":
            return resources.mount("none", resources.directory(), "-t", "tmpfs", "-o", "size=1m")
        need("mkfs.ext4")
        image = Path(resources.directory(), "image")
        with open(image, "wb") as f:
            f.truncate(1 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", image], check=True, timeout=LIMIT)
        return resources.mount(resources.loop(str(image)), str(image.parent / "mounted"))


def test_target_file_system_is_full(small, local, engine, policy, undo):
    case = Case(local("disk", pattern(SIZE)), f"{small}/target", engine, policy, undo)
    undo.callback(case.snap.close)  # or the file system could not be unmounted
    ballast = Path(small, "ballast")
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as f:
        while True:
            f.write(b"x" * 4096)
    with open(ballast, "r+b") as f:
        f.truncate(ballast.stat().st_size - 16 * 1024)  # room for a part of a cluster
    case.fails(errno.ENOSPC, "target-write")
    if policy == G:
        case.snapshot_is_t0()
    ballast.unlink()
    case.works_again()


@contextlib.contextmanager
def at_most(what, soft):
    import resource

    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_target_may_not_grow(local, engine, policy, undo):
    """RLIMIT_FSIZE; Python ignores SIGXFSZ, and says so of EFBIG."""
    import resource

    case = Case(local("disk", pattern(SIZE)), local("target"), engine, policy, undo)
    with at_most(resource.RLIMIT_FSIZE, CLUSTER + 4096):
        if policy == G:
            case.fails(errno.EFBIG, "target-write")
            case.snapshot_is_t0()
        else:  # the disk may not be written there either, but for its own first bytes
            with pytest.raises(OSError, match="File too large"):
                case.write()
            assert case.told == [case.snap]
            assert_broken(case.snap, errno.EFBIG, "target-write", *RUN)
            assert case.content() == file_bytes(case.disk.path) == case.t0
            stats = case.snap.stats()
            assert (stats.cbw_copies, stats.cbw_failures) == (0, 1)
    case.works_again()


def test_target_file_system_goes_read_only(local, resources, needs, engine, policy, undo):
    """As ext4 does by itself when it finds an error."""
    need("mkfs.ext4")
    home = Path(resources.directory())
    with open(home / "image", "wb") as f:
        f.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", home / "image"], check=True, timeout=LIMIT)
    with needs():
        device = resources.loop(str(home / "image"))
        resources.mount(device, str(home / "mounted"), "-o", "errors=remount-ro")
    trigger = Path(f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel's ext4 has no trigger_fs_error")
    case = Case(local("disk", pattern(SIZE)), home / "mounted" / "target", engine, policy, undo)
    undo.callback(case.snap.close)
    trigger.write_text("1")
    with pytest.raises(OSError, match="Read-only"):
        (home / "mounted" / "probe").touch()
    case.fails(errno.EROFS, "target-write")
    if policy == G:  # it stays so: each write says it, until the snapshot is given up
        case.snapshot_is_t0()
        case.fails(errno.EROFS, "target-write")
        case.snap.close()
    case.write()
    assert case.content() == case.written()


# ---- interrupted calls ----

INTERRUPTED = """
import sys
import cbwcore

path, io, policy = sys.argv[1:4]
with open(path, "rb") as f:
    t0 = f.read()
with cbwcore.Disk(path, io=io, direct=io == "io_uring") as disk:
    snap = disk.snapshot(on_cbw_error=policy)
    print("ready", flush=True)
    sys.stdin.readline()
    for c in range(4):
        disk.pwrite(b"n" * 8192, c * 65536 + 5)
        assert disk.pread(8192, c * 65536 + 5) == b"n" * 8192
    disk.pwrite_zeroes(65536, 512)
    disk.discard(2 * 65536, 4096)
    disk.flush()
    assert snap.pread(len(t0), 0) == t0
    stats = snap.stats()
    assert (snap.state, stats.cbw_copies, stats.cbw_failures) == ("armed", 4, 0), stats
    print("right", flush=True)
"""


@pytest.mark.parametrize("code", ["EINTR", "EAGAIN"])
def test_interrupted_calls_are_unseen(local, engine, policy, code):
    """Every third call, by strace: for data where psync does it; of the ring, where what it submits is not seen."""
    need("strace")
    path = local("disk", pattern(SIZE))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, path, engine["io"], policy],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    calls = "pread64,pwrite64" if engine["io"] == "psync" else "io_uring_enter"
    if code == "EINTR":
        calls += ",fdatasync"
    try:
        assert process.stdout.readline() == "ready\n"
        tracer = subprocess.Popen(
            f"strace -q -f -p {process.pid} -e trace={calls} -e inject={calls}:error={code}:when=1+3".split(),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{process.pid}/status").read_text(), "strace is there")
            out, err = process.communicate("go\n", timeout=LIMIT)
            assert (out, process.returncode) == ("right\n", 0), err
            seen = tracer.communicate(timeout=LIMIT)[1]
            assert sum("(INJECTED)" in line and "fdatasync" not in line for line in seen.splitlines()) > 2
        finally:
            tracer.kill()
            tracer.wait()
    finally:
        process.kill()
        process.wait()
