"""What all tests share: the storage matrix, disks on tmpfs, seeds, and the proof that a refusal changed nothing."""

import contextlib
import gc
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from engine_support import end_plan
from tls_support import make_tls_dir

import cbwcore
from cbwcore._cbwcore import FaultPlan
from cbwcore.cli import main
from cbwcore.engines import choose_engine

REQUIRED = os.environ.get("CBWCORE_REQUIRE_PEERS") == "1"
ENGINE = os.environ.get("CBWCORE_TEST_IO")  # an I/O engine: the same tests over it, where they do not name one
TESTS = Path(__file__).parent
SHM = "/dev/shm"
KIB = 1024
MIB = 1024 * KIB

hypothesis.settings.register_profile("cbwcore", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("cbwcore")


def pytest_configure() -> None:
    """A run that is terminated takes its mounts and loop devices down, too. What a shell runs in the background ignores
    SIGINT, and so would the programs that the tests start and interrupt."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    if ENGINE is not None:
        cbwcore.disk.choose_engine = cbwcore.snapshot.choose_engine = for_auto(ENGINE)


def for_auto(engine: str) -> Callable[..., tuple[str, str]]:
    """choose_engine(), with ``engine`` for "auto"."""
    return lambda io, *, direct=False: choose_engine(engine if io == "auto" else io, direct=direct)


# The quick set, `pytest -m "not slow"`, is without these: they start processes, search at length, or wait for time to
# pass.
SLOW = [
    "build",
    "fuzz",
    "interop",
    "model",
    "typing",
    "backup/test_week.py",
    "concurrency/test_nbd_loop.py",
    "concurrency/test_oracle.py",
    "concurrency/test_teardown.py",
    "faults/test_leaks.py",
    "faults/test_outside.py",
    "faults/test_plans.py",
    "faults/test_refusals.py",
    "faults/test_sweep.py",
    "images/test_partial.py",
    "images/test_qcow2.py",
    "images/test_reader_fuzz.py",
    "nbd/test_bad_clients.py",
    "nbd/test_limits.py",
    "nbd/test_waiting.py",
    "storage/test_late_copies.py",
    "unit/bitmap_store",
    "unit/nbd",
    "unit/serve",
    "unit/test_bench.py",
    "unit/test_cli.py",
    "unit/test_cli_backup.py",
    "unit/test_cli_bitmap.py",
]


# Forks thousands of times, and each copies the tables of this process's memory: at the end it takes four times as long.
FORKS = TESTS / "model/test_bitmap_kills.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and begin with the one that wants this process small."""
    items.sort(key=lambda item: item.path != FORKS)
    slow = [TESTS / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker("slow")


def forget_garbage() -> None:
    """What is left now is none; without it the many collections of `unchanged` are quick."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """What is there before the first test is pytest's."""
    forget_garbage()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """So is what is left at the end of a file: after 5000 tests it made each collection take 0.2 s."""
    if nextitem is not None and nextitem.path != item.path:
        forget_garbage()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Where CI requires everything, a skip is a failure, whichever test says it and why."""
    report = yield
    if REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, but CBWCORE_REQUIRE_PEERS=1 requires it: {report.longrepr[2]}"
    return report


def run(*command: str) -> str:
    """The output of a command; RuntimeError with its stderr if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as e:
        raise RuntimeError(f"{command[0]}: {e.strerror}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


# ---- seeds ----


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed, the same in every run, printed where it fails; CBWCORE_TEST_SEED=N varies it."""
    value = int(os.environ.get("CBWCORE_TEST_SEED") or zlib.crc32(request.node.nodeid.encode()))
    print(f"replay with CBWCORE_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


# ---- loop devices and file systems ----


def make_loop_node(node: str) -> None:
    """Containers may lack the nodes of free loop devices."""
    if not os.path.exists(node):
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(7, int(node.removeprefix("/dev/loop"))))


def attach_loop(image: str, sector: int = 512, *, read_only: bool = False) -> str:
    """A loop device over ``image``; others may take the free one first, so a few tries. RuntimeError."""
    if os.geteuid():
        raise RuntimeError("loop devices need root")
    options = ["--direct-io=off", "-b", str(sector), *(["--read-only"] if read_only else [])]
    for last_try in [False] * 9 + [True]:
        node = run("losetup", "-f")
        make_loop_node(node)
        try:
            run("losetup", *options, node, image)
        except RuntimeError as e:
            if last_try or "busy" not in str(e).lower():
                raise
            continue
        return node
    raise AssertionError


def unmount(where: str) -> None:
    """Also where a failed test has left a file open: then it goes when that is closed."""
    try:
        run("umount", where)
    except RuntimeError:
        run("umount", "-l", where)


class Resources:
    """Loop devices, mounts and directories; all of them are gone after close(), in reverse order."""

    def __init__(self) -> None:
        self.undo = contextlib.ExitStack()
        self._places: dict[str, str | RuntimeError] = {}

    def directory(self, parent: str | None = None) -> str:
        path = tempfile.mkdtemp(prefix="cbwcore-test-", dir=parent)
        self.undo.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def loop(self, image: str, sector: int = 512, *, read_only: bool = False) -> str:
        node = attach_loop(image, sector, read_only=read_only)
        self.undo.callback(run, "losetup", "-d", node)
        return node

    def node(self, path: str, device: int) -> str:
        """Another node of a block device."""
        os.mknod(path, stat.S_IFBLK | 0o600, device)
        self.undo.callback(os.unlink, path)
        return path

    def mount(self, source: str, where: str, *options: str) -> str:
        os.makedirs(where, exist_ok=True)
        run("mount", *options, source, where)
        self.undo.callback(unmount, where)
        return where

    def tmpfs(self) -> str:
        if not os.path.isdir(SHM):
            raise RuntimeError(f"there is no tmpfs at {SHM}")
        return self.directory(SHM)

    def file_system(self, kind: str) -> str:
        """A mounted, empty file system of 320 MiB (the least for xfs is 300), sparse."""
        home = self.directory()
        image = os.path.join(home, "image")
        with open(image, "wb") as f:
            f.truncate(320 * MIB)
        run(f"mkfs.{kind}", "-q", image)
        return self.mount(self.loop(image), os.path.join(home, "mounted"))

    def place(self, kind: str) -> str:
        """The directory for ``kind`` of storage, made once; skips or fails the test where it cannot be had."""
        if kind not in self._places:
            try:
                self._places[kind] = self.tmpfs() if kind == "tmpfs" else self.file_system(kind)
            except RuntimeError as e:
                self._places[kind] = e
        place = self._places[kind]
        if isinstance(place, RuntimeError):
            pytest.skip(f"{kind}: {place}")
        return str(place)

    def close(self) -> None:
        self.undo.close()


@pytest.fixture(scope="session")
def session_resources() -> Iterator[Resources]:
    resources = Resources()
    try:
        yield resources
    finally:
        gc.collect()
        resources.close()


@pytest.fixture
def resources() -> Iterator[Resources]:
    """For one test. A RuntimeError of its methods is a missing privilege or tool: see `needs`."""
    resources = Resources()
    try:
        yield resources
    finally:
        resources.close()


@pytest.fixture
def needs() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """``with needs():`` around privileged preparations: what cannot be had skips the test, or fails it in CI."""

    @contextlib.contextmanager
    def needs() -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            pytest.skip(str(e))

    return needs


# ---- the storage matrix ----


class Storage:
    """One kind of storage: makes disk images and targets there, and opens disks as its mode says."""

    def __init__(self, kind: str, direct: bool, home: str, resources: Resources) -> None:
        self.kind = kind
        self.direct = direct
        self.is_device = kind.startswith("loop")
        self.sector = int(kind.removeprefix("loop")) if self.is_device else 1
        self.home = tempfile.mkdtemp(dir=home)
        self._resources = resources
        self._count = 0
        resources.undo.callback(shutil.rmtree, self.home)

    def size(self, wanted: int) -> int:
        """``wanted`` bytes, rounded up to what this storage can have."""
        return -(-wanted // self.sector) * self.sector

    def new_path(self) -> str:
        self._count += 1
        return os.path.join(self.home, f"image{self._count}")

    def file(self, content: bytes) -> str:
        """A regular file; on loop storages it lies on tmpfs."""
        path = self.new_path()
        Path(path).write_bytes(content)
        return path

    def device(self, content: bytes) -> str:
        """A loop device, of 512 byte sectors where the storage itself is no device."""
        try:
            return self._resources.loop(self.file(content), max(self.sector, 512))
        except RuntimeError as e:
            pytest.skip(str(e))
            raise

    def image(self, content: bytes) -> str:
        """A disk with ``content``, of a size() that fits."""
        return self.device(content) if self.is_device else self.file(content)

    def disk(self, content: bytes) -> cbwcore.Disk:
        """An open disk; closed at the end."""
        return self.open(self.image(content))

    def open(self, path: str) -> cbwcore.Disk:
        disk = cbwcore.Disk(path, direct=self.direct)
        self._resources.undo.callback(disk.close)
        return disk


MATRIX = [(kind, direct) for kind in ("tmpfs", "ext4", "xfs", "loop512", "loop4096") for direct in (False, True)]


@pytest.fixture(params=MATRIX, ids=lambda p: f"{p[0]}-{'direct' if p[1] else 'buffered'}")
def storage(request: pytest.FixtureRequest, session_resources: Resources, resources: Resources) -> Storage:
    """Every kind of storage that the engine is for, buffered and with O_DIRECT."""
    kind, direct = request.param
    home = session_resources.place("tmpfs" if kind.startswith("loop") else kind)
    storage = Storage(kind, direct, home, resources)
    if direct and kind == "tmpfs":
        probe_direct(storage.home)
    return storage


def probe_direct(directory: str) -> None:
    """tmpfs has O_DIRECT from Linux 6.6 on."""
    path = os.path.join(directory, "probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as e:
        pytest.skip(f"this kernel's tmpfs has no O_DIRECT: {e.strerror}")
    finally:
        os.unlink(path)


# ---- disks for unit tests ----


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory, on tmpfs where there is one."""
    if not os.path.isdir(SHM):
        yield tmp_path
        return
    path = tempfile.mkdtemp(prefix="cbwcore-test-", dir=SHM)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path)


@pytest.fixture
def make_image(place: Path) -> Callable[..., str]:
    """``make_image(size_or_content, name)``: a file; of a size alone, with seeded bytes that are nowhere zero."""

    def make_image(content: int | bytes, name: str = "disk.img") -> str:
        path = place / name
        path.write_bytes(pattern(content) if isinstance(content, int) else content)
        return str(path)

    return make_image


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes without a zero among them, so that lost data never looks like a hole."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority, a server's certificate and a client's, under the names that all programs use."""
    return make_tls_dir(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def make_disk(make_image: Callable[..., str]) -> Iterator[Callable[..., cbwcore.Disk]]:
    """``make_disk(size_or_content, name, **options)``: an open disk, closed at the end."""
    with contextlib.ExitStack() as undo:

        def make_disk(content: int | bytes, name: str = "disk.img", **options: object) -> cbwcore.Disk:
            disk = cbwcore.Disk(make_image(content, name), **options)
            undo.callback(disk.close)
            return disk

        yield make_disk


@pytest.fixture
def plan() -> Iterator[FaultPlan]:
    """A fault plan whose stalled calls go on at the end, also where the test failed; then it is printed."""
    plan = FaultPlan()
    try:
        yield plan
    finally:
        end_plan(plan)


# ---- what tests assert ----


def state_of(path: str | Path) -> object:
    """All that a refusal must leave as it was."""
    try:
        kind = os.lstat(path)
    except OSError:
        return None
    if stat.S_ISREG(kind.st_mode) or stat.S_ISBLK(kind.st_mode):
        return kind.st_ino, kind.st_size, Path(path).read_bytes()
    return kind.st_ino, stat.S_IFMT(kind.st_mode)


def open_descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: path for fd, path in found.items() if not path.startswith(f"/proc/{os.getpid()}/")}


@pytest.fixture
def unchanged(place: Path) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """``with unchanged(disk, ..., path, ...):`` what is inside leaves those disks and files, all that is in ``place``,
    the open descriptors and the disks' snapshots and bitmaps exactly as they were."""

    def look(things: tuple[object, ...]) -> dict[str, object]:
        files = {str(p): state_of(p) for p in sorted(place.rglob("*"))}
        for thing in things:
            path = thing.path if isinstance(thing, cbwcore.Disk) else thing
            files[str(path)] = state_of(str(path))
        disks = [thing for thing in things if isinstance(thing, cbwcore.Disk)]
        return {
            "files": files,
            "descriptors": open_descriptors(),
            "snapshots": [(disk.snapshots, [s.state for s in disk.snapshots]) for disk in disks],
            "bitmaps": [{name: disk.bitmaps[name].count() for name in disk.bitmaps} for disk in disks],
        }

    @contextlib.contextmanager
    def unchanged(*things: object) -> Iterator[None]:
        gc.collect()
        before = look(things)
        yield
        after = look(things)
        for what, was in before.items():
            assert after[what] == was, f"{what} changed"

    return unchanged


@pytest.fixture
def assert_status() -> Callable[..., list[cbwcore.Extent]]:
    """``assert_status(disk_or_snapshot, content)``: block status covers all of it without gap, overlap or empty extent,
    and what it calls zero is zero in ``content`` (R20). The extents."""

    def assert_status(source: cbwcore.Disk | cbwcore.Snapshot, content: bytes) -> list[cbwcore.Extent]:
        extents = list(source.block_status())
        position = 0
        for extent in extents:
            assert extent.offset == position
            assert extent.length > 0
            position += extent.length
            if extent.zero:
                assert not extent.data
                assert not any(content[extent.offset : position]), f"{extent} is called zero"
        assert position == source.size == len(content)
        return extents

    return assert_status


@pytest.fixture(name="run")
def run_main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """main() in this process: its exit code, stdout and stderr."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in argv])
        except SystemExit as e:
            status = int(e.code or 0)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python(code, *args)``: a Python process that must end in ``timeout`` seconds; a hang is killed."""

    def run_python(code: str, *args: object, timeout: float = 15) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, args)]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as e:
            shown = e.stderr.decode() if isinstance(e.stderr, bytes) else e.stderr
            pytest.fail(f"the process hung for {timeout} s\n{shown or ''}", pytrace=False)

    return run_python


@pytest.fixture
def in_threads() -> Callable[..., list[object]]:
    """``in_threads(f, g, ...)``: call all at once, wait for all; the results, or the first exception."""

    def in_threads(*calls: Callable[[], object]) -> list[object]:
        results: list[object] = [None] * len(calls)
        errors: list[BaseException] = []

        def call(i: int) -> None:
            try:
                results[i] = calls[i]()
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(calls))]
        end = time.monotonic() + 60
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))
            assert not thread.is_alive(), "a thread hangs"
        if errors:
            raise errors[0]
        return results

    return in_threads
