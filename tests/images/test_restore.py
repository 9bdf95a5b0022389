"""Restoring to files and devices, reading back, and what is left when it fails."""

import errno
import os

import images_support
import pytest
from images_support import UNIT, backup, changed, layout

import cbwcore
from cbwcore import ConfigError, StateError
from cbwcore.images import restore as restore_module
from cbwcore.images import workers

MIB = 1 << 20
SIZE = 20 * UNIT + 100


@pytest.fixture
def chain(place, rng):
    """full, and inc on it, in ``place``; the content of inc."""
    content = layout(rng, SIZE)
    backup(place / "full", content, compress="zstd")
    new, dirty = changed(rng, content)
    backup(place / "inc", new, dirty=dirty, backing=place / "full")
    return new


@pytest.fixture
def device(resources, needs, place):
    def device(size):
        (place / "device").write_bytes(b"garbage!" * (size // 8))
        with needs():
            return resources.loop(str(place / "device"))

    return device


def read(path, length=-1):
    with open(path, "rb") as f:
        return f.read(length)


@pytest.mark.parametrize("verify", [False, True])
def test_a_file(place, chain, verify):
    done = cbwcore.restore(place / "inc", place / "new", verify=verify)
    assert read(place / "new") == chain
    assert os.stat(place / "new").st_mode & 0o777 == 0o600
    assert (done.size, done.verified, done.destination) == (SIZE, verify, str(place / "new"))
    assert done.data_bytes == sum(min(UNIT, SIZE - i) for i in range(0, SIZE, UNIT) if any(chain[i : i + UNIT]))
    assert [os.path.basename(image.path) for image in done.chain] == ["inc", "full"]
    assert [image.sync for image in done.chain] == ["incremental", "full"]
    assert not (place / "new.partial").exists()


def test_a_file_is_sparse(place):
    content = bytes(8 * MIB) + b"\1" * UNIT + bytes(8 * MIB)
    backup(place / "full", content)
    backup(place / "inc", bytes(len(content)), dirty=[128], backing=place / "full")
    cbwcore.restore(place / "full", place / "a")
    cbwcore.restore(place / "inc", place / "b")
    assert os.stat(place / "a").st_blocks * 512 <= UNIT + 4096
    assert os.stat(place / "b").st_blocks * 512 <= 4096
    assert read(place / "a") == content
    assert read(place / "b") == bytes(len(content))


def test_a_file_that_is_there(place, chain):
    (place / "new").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="there already"):
        cbwcore.restore(place / "inc", place / "new")
    assert read(place / "new") == b"precious"
    cbwcore.restore(place / "inc", place / "new", overwrite=True)
    assert read(place / "new") == chain


@pytest.mark.parametrize("name", ["full", "inc", "link", "full.cbw.json"])
def test_it_is_none_of_the_chain(place, chain, name, unchanged):
    os.link(place / "full", place / "link")
    with unchanged(), pytest.raises(ConfigError, match="itself, which is needed"):
        cbwcore.restore(place / "inc", place / name, overwrite=True)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("more", [0, 512, MIB])
def test_a_device(place, rng, device, verify, more):
    content = layout(rng, 20 * UNIT)
    backup(place / "full", content)
    node = device(len(content) + more)
    before = read(node)
    cbwcore.restore(place / "full", node, verify=verify)
    assert read(node) == content + before[len(content) :]


def test_a_device_larger_than_a_disk_of_odd_size(place, chain, device):
    node = device(2 * MIB)
    before = read(node)
    cbwcore.restore(place / "inc", node, verify=True)
    assert read(node) == chain + before[SIZE:]


def test_a_smaller_device_is_refused_before_the_first_byte(place, chain, device):
    node = device(MIB)
    with pytest.raises(ConfigError, match=f"is 1048576 bytes, less than the disk's {SIZE}"):
        cbwcore.restore(place / "inc", node)
    assert read(node) == b"garbage!" * (MIB // 8)


def test_a_device_in_use_is_refused(place, chain, device):
    node = device(2 * MIB)
    with cbwcore.Disk(node), pytest.raises(ConfigError, match="in use"):
        cbwcore.restore(place / "inc", node)
    assert read(node) == b"garbage!" * (2 * MIB // 8)


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_damaged_chain_is_refused_before_the_first_byte(place, rng, device, kind):
    content = layout(rng, SIZE, data=1)
    backup(place / "full", content)
    with open(place / "full", "r+b") as f:
        f.seek(3 * UNIT + 5)
        f.write(b"flip")
    target = device(2 * MIB) if kind == "device" else str(place / "new")
    with pytest.raises(StateError, match="full is damaged"):
        cbwcore.restore(place / "full", target)
    if kind == "device":
        assert read(target) == b"garbage!" * (2 * MIB // 8)
    else:
        assert not any(name.startswith("new") for name in os.listdir(place))


@pytest.mark.parametrize("kind", ["file", "device"])
@pytest.mark.parametrize("where", [0, 7 * UNIT + 123, SIZE - 1])
@pytest.mark.parametrize("data", [0, 1])
def test_reading_back_finds_a_flipped_byte(place, rng, device, monkeypatch, kind, where, data):
    """Storage that changes what it was given, in data and where zeroes belong."""
    content = layout(rng, SIZE, data=data)
    backup(place / "full", content)
    target = device(2 * MIB) if kind == "device" else str(place / "new")
    real = restore_module.compare

    def compare(chain, fd, name, progress):
        byte = os.pread(fd, 1, where)
        os.pwrite(fd, bytes([byte[0] ^ 8]), where)
        real(chain, fd, name, progress)

    monkeypatch.setattr(restore_module, "compare", compare)
    with pytest.raises(StateError, match=f"differs from the backup at offset {where}:"):
        cbwcore.restore(place / "full", target, verify=True)
    if kind == "device":
        assert read(target, UNIT) == bytes(UNIT)
    else:
        assert not any(name.startswith("new") for name in os.listdir(place))


@pytest.mark.parametrize(
    ("kind", "call"),
    [("file", "pwrite"), ("file", "fsync"), ("file", "rename"), ("device", "pwrite"), ("device", "fsync")],
)
def test_a_destination_that_fails(place, chain, device, monkeypatch, kind, call):
    target = device(2 * MIB) if kind == "device" else str(place / "new")
    real, count = getattr(os, call), [0]

    def fail(*arguments, **options):
        count[0] += 1
        if count[0] == {"pwrite": 4, "fsync": 2 if kind == "device" else 1, "rename": 1}[call]:
            raise OSError(errno.EIO, "broken")
        return real(*arguments, **options)

    if call == "rename":
        monkeypatch.setattr("cbwcore.images.partial.PartialFile._rename_new", fail)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="broken") as e:
        cbwcore.restore(place / "inc", target)
    assert e.value.filename == target
    monkeypatch.undo()
    if kind == "device":
        assert read(target, UNIT) == bytes(UNIT)
    else:
        assert not any(name.startswith("new") for name in os.listdir(place))
    cbwcore.restore(place / "inc", target)
    assert read(target, SIZE) == chain


def test_a_full_file_system(place, chain, resources, needs):
    with needs():
        small = resources.mount("tmpfs", str(place / "small"), "-t", "tmpfs", "-o", "size=256k")
    with pytest.raises(OSError, match="No space") as e:
        cbwcore.restore(place / "inc", f"{small}/new")
    assert e.value.errno == errno.ENOSPC
    assert e.value.filename == f"{small}/new"
    assert os.listdir(small) == []


def test_the_file_size_limit(place, chain, run_python):
    code = """
import errno, os, resource, sys, cbwcore
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    cbwcore.restore(sys.argv[1] + "/inc", sys.argv[1] + "/new")
except OSError as e:
    assert e.errno == errno.EFBIG, e
else:
    raise AssertionError
assert not any(name.startswith("new") for name in os.listdir(sys.argv[1]))
"""
    done = run_python(code, place)
    assert done.returncode == 0, done.stderr


def test_a_backup_on_a_device_is_restored_by_its_manifest(place, rng, device):
    content = layout(rng, 20 * UNIT)
    node = device(2 * MIB)
    backup(node, content, format="raw", manifest=place / "m.json")
    cbwcore.restore(node, place / "new", manifest=place / "m.json", verify=True)
    assert read(place / "new") == content
    with pytest.raises(StateError, match="no finished backup"):
        cbwcore.restore(node, place / "other")


def test_progress(place, chain):
    """Each part from 0 to its end, never back, never beyond."""
    told = []
    cbwcore.restore(place / "inc", place / "new", verify=True, progress=lambda *what: told.append(what))
    assert list(dict.fromkeys(label for label, _, _ in told)) == ["check", "restore", "verify"]
    for label in ("check", "restore", "verify"):
        totals = {total for name, _, total in told if name == label}
        done = [done for name, done, _ in told if name == label]
        assert len(totals) == 1
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == totals.pop()
    told.clear()
    cbwcore.verify_backup(place / "inc", progress=lambda *what: told.append(what))
    assert {label for label, _, _ in told} == {"check"}


@pytest.mark.parametrize("label", ["check", "restore", "verify"])
def test_a_callback_that_raises_ends_it(place, chain, label):
    def progress(told, done, total):
        if told == label and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cbwcore.restore(place / "inc", place / "new", verify=True, progress=progress)
    assert not any(name.startswith("new") for name in os.listdir(place))


def test_an_empty_disk(place):
    backup(place / "full", b"")
    done = cbwcore.restore(place / "full", place / "new", verify=True)
    assert read(place / "new") == b""
    assert (done.size, done.data_bytes) == (0, 0)


def test_verify_tells_of_the_chain(place, chain):
    found = cbwcore.verify_backup(place / "inc")
    assert found.complete
    assert found.size == SIZE
    assert [os.path.basename(image.path) for image in found.chain] == ["inc", "full"]


def test_work_stops_at_the_first_error_and_waits_for_all():
    begun, running = [], []

    def work(piece, buffer):
        running.append(piece)
        try:
            if piece == 5:
                raise ValueError("five")
        finally:
            running.remove(piece)

    def pieces():
        for i in range(10_000):
            begun.append(i)
            yield i

    with pytest.raises(ValueError, match="five"):
        workers.work_through(pieces(), work)
    assert running == []
    assert len(begun) < 100


def test_pieces_that_cannot_be_made_stop_the_work():
    def pieces():
        yield 1
        raise StateError("damaged")

    with pytest.raises(StateError, match="damaged"):
        workers.work_through(pieces(), lambda piece, buffer: None)


def test_a_restored_disk_is_a_disk(place, chain):
    """The whole way: a disk, its snapshot into a backup, a restored disk."""
    cbwcore.restore(place / "inc", place / "disk")
    with cbwcore.Disk(place / "disk") as disk, disk.snapshot(place / "fleece") as snapshot:
        disk.pwrite(b"\7" * SIZE, 0)
        backup(place / "again", snapshot.pread(SIZE, 0))
    cbwcore.restore(place / "again", place / "new")
    assert read(place / "new") == chain
    assert images_support.UNIT == UNIT
