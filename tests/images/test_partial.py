"""Nothing looks complete that is not: each step of the protocol fails, and each is the last of a killed process."""

import contextlib
import errno
import os
import signal

import images_support
import pytest
from images_support import UNIT, backup, layout

import cbwcore
from cbwcore import ConfigError, StateError
from cbwcore.images.output import open_output
from cbwcore.images.partial import PartialFile

STEPS = ("open", "ftruncate", "pwrite", "pwritev", "fsync", "close", "rename", "unlink")


class Counted:
    """Stands before the calls of ``os`` that change something; at the call of number ``at`` it does ``what``."""

    def __init__(self, at, what):
        self.count = 0
        self.at = at
        self.what = what
        self.real = {name: getattr(os, name) for name in STEPS}
        self.real_rename_new = PartialFile._rename_new

    def __enter__(self):
        for name in STEPS:
            setattr(os, name, lambda *a, name=name, **k: self.call(self.real[name], name, a, k))
        PartialFile._rename_new = lambda *a: self.call(self.real_rename_new, "rename", a, {})
        return self

    def __exit__(self, *exc):
        for name in STEPS:
            setattr(os, name, self.real[name])
        PartialFile._rename_new = self.real_rename_new

    def call(self, real, name, arguments, options):
        self.count += 1
        if self.count == self.at:
            self.what(name)
        return real(*arguments, **options)


def fail(code):
    """Raise that error; a close has closed all the same, and is not failed here."""

    def what(name):
        if name != "close":
            raise OSError(code, os.strerror(code))

    return what


def die(name):
    os.kill(os.getpid(), signal.SIGKILL)


def assert_no_backup(path):
    with pytest.raises((StateError, OSError)):
        cbwcore.verify_backup(path)
    with pytest.raises((StateError, OSError)):
        cbwcore.restore(path, f"{path}.restored")


def assert_backup(path, content):
    cbwcore.restore(path, f"{path}.restored", verify=True)
    with open(f"{path}.restored", "rb") as f:
        assert f.read() == content
    os.unlink(f"{path}.restored")


CASES = {
    "raw": {"format": "raw"},
    "qcow2": {"format": "qcow2"},
    "zstd": {"format": "qcow2", "compress": "zstd"},
    "layered": {"format": "qcow2", "dirty": [0, 2, 3, 5]},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def write_backup(request, place, rng):
    """``write_backup()`` writes ``write_backup.content`` to ``write_backup.path``."""
    content = layout(rng, 6 * UNIT + 100, data=0.7)
    options = dict(request.param)
    if "dirty" in options:
        backup(place / "parent", content)
        options["backing"] = place / "parent"

    def write_backup(**more):
        return backup(place / "full", content, longest=2, **options, **more)

    write_backup.content, write_backup.path = content, place / "full"
    return write_backup


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_each_step_fails(write_backup, place, code):
    before = sorted(os.listdir(place))
    at = 0
    while True:
        at += 1
        descriptors = len(os.listdir("/proc/self/fd"))
        with Counted(at, fail(code)) as counted, contextlib.suppress(OSError):
            write_backup()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if counted.count < at:
            break
        if "full" not in os.listdir(place):
            assert_no_backup(write_backup.path)
            left = [name for name in os.listdir(place) if name not in before]
            assert all(name.endswith(".partial") for name in left), left  # where removing it is what failed
        else:
            assert_backup(write_backup.path, write_backup.content)
        write_backup(overwrite=True)  # what is left does not hinder the next run
        assert_backup(write_backup.path, write_backup.content)
        assert sorted(os.listdir(place)) == sorted([*before, "full", "full.cbw.json"])
        os.unlink(place / "full")
        os.unlink(place / "full.cbw.json")
    assert at > 15


def test_killed_at_each_step(write_backup, place):
    before = sorted(os.listdir(place))
    at, backups = 0, 0
    while True:
        at += 1
        pid = os.fork()
        if pid == 0:
            try:
                with Counted(at, die):
                    write_backup()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        if (place / "full").exists():
            backups += 1
            assert_backup(write_backup.path, write_backup.content)
        else:
            assert_no_backup(write_backup.path)
        write_backup(overwrite=True)
        assert_backup(write_backup.path, write_backup.content)
        assert sorted(os.listdir(place)) == sorted([*before, "full", "full.cbw.json"])
        os.unlink(place / "full")
        os.unlink(place / "full.cbw.json")
        if status == 0:
            break
    assert at > 15
    assert 1 <= backups < at / 2


def test_killed_while_it_replaces_a_backup(place, rng):
    """What is at the name is the old backup, or the new one, or refused; never one with the manifest of the other."""
    old, new = layout(rng, 6 * UNIT), layout(rng, 6 * UNIT)
    seen, at = set(), 0
    while True:
        at += 1
        backup(place / "full", old, overwrite=True)
        pid = os.fork()
        if pid == 0:
            try:
                with Counted(at, die):
                    backup(place / "full", new, overwrite=True, compress="zstd")
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        try:
            cbwcore.restore(place / "full", place / "restored", overwrite=True)
            seen.add({old: "old", new: "new"}[(place / "restored").read_bytes()])
        except StateError:
            seen.add("refused")
        if status == 0:
            break
    assert seen == {"old", "refused", "new"}


class Recorded(Counted):
    """Tells the order of what was done, by the names of the files."""

    def __init__(self):
        super().__init__(0, None)
        self.steps = []

    def call(self, real, name, arguments, options):
        if name in ("fsync", "pwrite", "pwritev") and isinstance(arguments[0], int):
            file = os.path.basename(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            if name == "fsync" or arguments[2] == 0:
                self.steps.append((name, file))
        elif name == "rename":
            self.steps.append((name, arguments[1] if isinstance(arguments[0], str) else arguments[0].name))
        return super().call(real, name, arguments, options)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_the_order_of_the_steps(place, format):
    """All durable, the manifest durable, the header durable; then the names, the image's last; then those durable."""
    with Recorded() as recorded:
        backup(place / "full", bytes(UNIT) + b"\1" * UNIT, format=format)
    folder = place.name
    steps = [step for step in recorded.steps if step[1] == folder or step[1].startswith("full")]
    header = [("pwrite", "full.partial"), ("fsync", "full.partial")] if format == "qcow2" else []
    assert steps == [
        ("fsync", "full.partial"),
        ("pwrite", "full.cbw.json.partial"),
        ("fsync", "full.cbw.json.partial"),
        *header,
        ("rename", "full.cbw.json"),
        ("rename", "full"),
        ("fsync", folder),
    ]


def test_a_second_writer_is_refused_and_the_first_goes_on(place):
    with open_output(place / "full", size=UNIT, format="raw") as out:
        for format in ("raw", "qcow2"):
            with pytest.raises(ConfigError, match=r"in use: another writer has full\.partial locked"):
                open_output(place / "full", size=UNIT, format=format, overwrite=True)
        images_support.store(out, b"\1" * UNIT)
        out.finish(images_support.facts())
    assert_backup(place / "full", b"\1" * UNIT)


def test_a_leftover_that_is_another_name_of_a_file_is_only_taken_off(place):
    (place / "precious").write_bytes(b"precious")
    (place / "full.partial").hardlink_to(place / "precious")
    backup(place / "full", b"\1" * UNIT)
    assert (place / "precious").read_bytes() == b"precious"


def test_a_leftover_that_another_writer_takes_off_meanwhile(place, monkeypatch):
    """Between the making of a partial and its locking: then it is made again."""
    from cbwcore.images import partial

    real, taken = partial.lock, []

    def lock(fd, *, exclusive):
        if not taken:
            taken.append(1)
            os.unlink(place / "full.partial")
            (place / "full.partial").write_bytes(b"another's")
        return real(fd, exclusive=exclusive)

    monkeypatch.setattr(partial, "lock", lock)
    backup(place / "full", b"\1" * UNIT)
    assert_backup(place / "full", b"\1" * UNIT)


def test_a_leftover_in_whose_place_another_writer_is_meanwhile(place, monkeypatch):
    """Between the opening of a leftover and its locking: then that writer's is left alone."""
    from cbwcore.images import partial

    real, taken = partial.lock, []
    (place / "full.partial").write_bytes(b"leftover")

    def lock(fd, *, exclusive):
        if not taken:
            os.unlink(place / "full.partial")
            taken.append(os.open(place / "full.partial", os.O_RDWR | os.O_CREAT, 0o600))
            assert real(taken[0], exclusive=True)
        return real(fd, exclusive=exclusive)

    monkeypatch.setattr(partial, "lock", lock)
    with pytest.raises(ConfigError, match="in use: another writer"):
        open_output(place / "full", size=UNIT, format="raw")
    assert os.path.samestat(os.fstat(taken[0]), os.stat(place / "full.partial"))
    os.close(taken[0])


def test_abort_keeps_the_partial_if_asked(place):
    out = open_output(place / "full", size=UNIT, format="raw")
    images_support.store(out, b"\1" * UNIT)
    out.abort(keep=True)
    out.abort()
    assert os.listdir(place) == ["full.partial"]
    assert (place / "full.partial").read_bytes() == b"\1" * UNIT
    backup(place / "full", b"\2" * UNIT, format="raw")
    assert_backup(place / "full", b"\2" * UNIT)


def test_a_finish_that_failed_keeps_no_header(place, monkeypatch):
    out = open_output(place / "full", size=UNIT, format="qcow2")
    images_support.store(out, b"\1" * UNIT)

    def sync_folder(self):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(PartialFile, "sync_folder", sync_folder)
    with pytest.raises(OSError, match="broken"):
        out.finish(images_support.facts())
    monkeypatch.undo()
    assert not (place / "full").exists()
    assert not (place / "full.cbw.json").exists()
    out.abort(keep=True)
    assert os.listdir(place) == ["full.partial"]
    with open(place / "full.partial", "rb") as f:
        assert f.read(4) == bytes(4)


def test_a_file_system_without_renames_that_do_not_replace(place, monkeypatch):
    import ctypes

    class Libc:
        @staticmethod
        def renameat2(*_):
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr("cbwcore.images.partial.ctypes.CDLL", lambda *_, **__: Libc)
    backup(place / "full", b"\1" * UNIT, format="raw")
    assert_backup(place / "full", b"\1" * UNIT)
    with open_output(place / "other", size=UNIT, format="raw") as out:
        (place / "other").write_bytes(b"precious")
        with pytest.raises(ConfigError, match="there already"):
            out.finish(images_support.facts())
    assert (place / "other").read_bytes() == b"precious"


def test_a_full_file_system(place, resources, needs, rng):
    """A tmpfs of 2 MiB: no step leaves what looks complete, wherever the space ends."""
    with needs():
        small = resources.mount("tmpfs", str(place / "small"), "-t", "tmpfs", "-o", "size=2m,nr_inodes=64")
    path = f"{small}/full"
    for units in range(24, 34):
        content = rng.randbytes(units * UNIT)
        for options in ({"format": "raw"}, {"format": "qcow2"}, {"format": "qcow2", "compress": "zstd"}):
            error = None
            try:
                backup(path, content, **options)
            except OSError as e:
                error = e
            if error is not None:
                assert error.errno == errno.ENOSPC
                assert error.filename.startswith(path)
                assert os.listdir(small) == []
            else:
                assert cbwcore.verify_backup(path).size == len(content)
                os.unlink(path)
                os.unlink(f"{path}.cbw.json")


def test_the_file_size_limit(place, run_python):
    code = """
import errno, os, resource, sys
sys.path.insert(0, sys.argv[2])
from images_support import backup
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for options in ({"format": "raw"}, {"format": "qcow2"}):
    try:
        backup(sys.argv[1] + "/full", b"\\1" * 500_000, **options)
    except OSError as e:
        assert e.errno == errno.EFBIG, e
    else:
        raise AssertionError(options)
    assert os.listdir(sys.argv[1]) == [], os.listdir(sys.argv[1])
"""
    done = run_python(code, place, os.path.dirname(images_support.__file__))
    assert done.returncode == 0, done.stderr
