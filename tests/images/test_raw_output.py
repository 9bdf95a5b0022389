"""Raw backups: sparse files, and block devices that never look complete before they are."""

import errno
import os
import threading

import images_support
import pytest
from images_support import UNIT, backup, layout, store

import cbwcore
from cbwcore import ConfigError, StateError
from cbwcore._cbwcore import zero_units
from cbwcore.images import fileio, raw_output
from cbwcore.images.manifest import read_manifest
from cbwcore.images.output import open_output
from cbwcore.images.raw_output import data_runs

MIB = 1 << 20


def read(path, length=None):
    with open(path, "rb") as f:
        return f.read() if length is None else f.read(length)


@pytest.fixture
def device(resources, needs, place):
    """``device(size)``: a loop device full of garbage."""

    def device(size, name="device"):
        (place / name).write_bytes(b"garbage!" * (size // 8))
        with needs():
            return resources.loop(str(place / name))

    return device


# ---- files ----


@pytest.mark.parametrize("size", [0, 1, 511, UNIT, UNIT + 1, 30 * UNIT + 77])
def test_a_file_is_the_disk(place, rng, size):
    content = layout(rng, size)
    manifest = backup(place / "full", content, format="raw", rng=rng)
    assert read(place / "full") == content
    assert (manifest.image.format, manifest.image.bytes, manifest.size) == ("raw", size, size)
    assert manifest.data_bytes == sum(len(run) for _, run in data_runs(memoryview(content), zero_units(content, UNIT)))
    assert manifest.zero_bytes == size - manifest.data_bytes
    assert os.stat(place / "full").st_mode & 0o777 == 0o600
    assert sorted(os.listdir(place)) == ["full", "full.cbw.json"]


def test_zeroes_are_holes(place):
    content = bytes(10 * MIB) + b"\1" * UNIT + bytes(10 * MIB)
    backup(place / "full", content, format="raw")
    assert os.stat(place / "full").st_blocks * 512 <= UNIT + 4096


def test_16_tib_sparse(place):
    size = 1 << 44
    with open_output(place / "full", size=size, format="raw") as out:
        out.write(out.begin(size - UNIT, UNIT), memoryview(b"\1" * UNIT), b"\0")
        out.finish(images_support.facts())
    assert os.stat(place / "full").st_blocks * 512 <= UNIT + 4096
    assert cbwcore.verify_backup(place / "full").chain[0].data_bytes == UNIT


def test_a_read_only_array_of_another_item_is_taken(place):
    content = memoryview(b"\1\2\3\4" * (UNIT // 4)).cast("I")
    with open_output(place / "full", size=UNIT, format="raw") as out:
        out.write(out.begin(0, UNIT), content, b"\0")
        out.finish(images_support.facts())
    assert read(place / "full") == content.tobytes()


def test_a_view_that_is_not_the_piece_is_refused(place):
    with open_output(place / "full", size=2 * UNIT, format="raw") as out:
        piece = out.begin(0, UNIT)
        for view, zeroes in ((b"\1" * (UNIT - 1), b"\0"), (b"\1" * UNIT, b"\0\0"), (b"\1" * UNIT, b"")):
            with pytest.raises(ConfigError, match="are not <Piece"):
                out.write(piece, memoryview(view), zeroes)
        out.write(piece, memoryview(b"\1" * UNIT), b"\0")
        with pytest.raises(ConfigError, match="stored already"):
            out.write(piece, memoryview(b"\1" * UNIT), b"\0")
        with pytest.raises(ConfigError, match="stored already"):
            out.write_zeroes(piece)
        assert out.data_bytes == UNIT


def test_a_piece_that_never_came_is_no_backup(place):
    with open_output(place / "full", size=2 * UNIT, format="raw") as out:
        out.begin(0, UNIT)
        with pytest.raises(ConfigError, match="is not stored"):
            out.finish(images_support.facts())
    assert os.listdir(place) == []


def test_finish_is_for_once_and_fits_the_sync(place):
    with open_output(place / "full", size=UNIT, format="raw") as out:
        with pytest.raises(ConfigError, match="layered"):
            out.finish(images_support.facts("incremental"))
        out.finish(images_support.facts())
        with pytest.raises(ConfigError, match="finished or given up"):
            out.finish(images_support.facts())
        out.abort()
    cbwcore.verify_backup(place / "full")
    with (
        open_output(place / "inc", size=UNIT, format="qcow2", layered=True) as out,
        pytest.raises(ConfigError, match="not layered"),
    ):
        out.finish(images_support.facts("full"))


def test_a_file_that_is_there_is_replaced_only_when_asked(place, unchanged):
    (place / "full").write_bytes(b"precious")
    with unchanged(), pytest.raises(ConfigError, match="is there already"):
        open_output(place / "full", size=UNIT, format="raw")
    with open_output(place / "full", size=UNIT, format="raw", overwrite=True) as out:
        assert read(place / "full") == b"precious"
        store(out, b"\2" * UNIT)
        assert read(place / "full") == b"precious"
        out.finish(images_support.facts())
    assert read(place / "full") == b"\2" * UNIT


def test_a_file_that_came_meanwhile_is_not_replaced(place):
    with open_output(place / "full", size=UNIT, format="raw") as out:
        (place / "full").write_bytes(b"precious")
        with pytest.raises(FileExistsError):
            out.finish(images_support.facts())
    assert read(place / "full") == b"precious"
    assert os.listdir(place) == ["full"]


@pytest.mark.parametrize("target", ["precious", "nowhere", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_not_followed(place, unchanged, target, overwrite):
    (place / "precious").write_bytes(b"precious")
    (place / "folder").mkdir()
    (place / "full").symlink_to(target)
    with unchanged(), pytest.raises(ConfigError, match="symbolic link"):
        open_output(place / "full", size=UNIT, format="raw", overwrite=overwrite)


def test_a_link_as_partial_is_not_followed(place, unchanged):
    (place / "precious").write_bytes(b"precious")
    (place / "full.partial").symlink_to("precious")
    with unchanged(), pytest.raises(ConfigError, match="in the way"):
        open_output(place / "full", size=UNIT, format="raw")


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_not_replaced(place, unchanged, kind):
    for name in ("full", "other.partial"):
        (place / name).mkdir() if kind == "folder" else os.mkfifo(place / name)
    with unchanged():
        with pytest.raises(ConfigError, match="no regular file"):
            open_output(place / "full", size=UNIT, format="raw", overwrite=True)
        with pytest.raises(ConfigError, match="no regular file"):
            open_output(place / "other", size=UNIT, format="raw", overwrite=True)


def test_a_folder_that_is_not_there(place):
    with pytest.raises(FileNotFoundError) as e:
        open_output(place / "no" / "full", size=UNIT, format="raw")
    assert e.value.filename == str(place / "no")


@pytest.mark.parametrize("length", [239, 246, 247, 248, 255])
def test_names_too_long_for_partials_are_refused_at_once(place, length):
    """Not in the end, when the manifest is written."""
    with pytest.raises(OSError, match="name too long") as e:
        open_output(place / ("n" * length), size=UNIT, format="raw")
    assert e.value.errno == errno.ENAMETOOLONG
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"format": "vmdk"}, "none of raw, qcow2"),
        ({"format": "raw", "compress": "zstd"}, "raw image cannot be compressed"),
        ({"format": "raw", "layered": True}, "raw image cannot be layered"),
        ({"format": "raw", "layered": True, "backing": "full"}, "raw image cannot be layered"),
        ({"format": "qcow2", "compress": "zlib"}, "none of zstd"),
        ({"format": "qcow2", "backing": "full"}, "is layered"),
        ({"format": "raw", "size": -1}, "negative"),
        ({"format": "raw", "manifest": "m.json"}, "beside it"),
    ],
)
def test_options_that_cannot_be(place, unchanged, options, why):
    with unchanged(), pytest.raises(ConfigError, match=why):
        open_output(place / "new", **({"size": UNIT} | options))


def test_it_is_none_of_the_files_that_are_needed(place, unchanged):
    for name in ("disk", "fleece", "raw.partial"):
        (place / name).write_bytes(b"\1" * UNIT)
    (place / "disk-too").hardlink_to(place / "disk")
    backup(place / "full", b"\1" * UNIT)
    backup(place / "mon", b"\1" * UNIT, dirty=[0], backing=place / "full")
    with unchanged():
        for name in ("disk", "disk-too", "fleece", "raw"):
            with pytest.raises(ConfigError, match="itself, which is needed"):
                open_output(
                    place / name,
                    size=UNIT,
                    format="raw",
                    overwrite=True,
                    apart=[place / "disk", place / "fleece", place / "none", place / "raw.partial"],
                )
        for name in ("mon", "full", "full.cbw.json"):
            with pytest.raises(ConfigError, match="itself, which is needed"):
                open_output(
                    place / name, size=UNIT, format="qcow2", layered=True, overwrite=True, backing=place / "mon"
                )


def test_a_parent_must_be_a_backup_of_such_a_disk(place, unchanged):
    (place / "plain").write_bytes(b"\1" * UNIT)
    backup(place / "full", b"\1" * UNIT)
    options = {"format": "qcow2", "layered": True}
    with unchanged():
        with pytest.raises(StateError, match="plain is no finished backup"):
            open_output(place / "inc", size=UNIT, backing=place / "plain", **options)
        with pytest.raises(StateError, match="none is no finished backup"):
            open_output(place / "inc", size=UNIT, backing=place / "none", **options)
        with pytest.raises(ConfigError, match="a disk of 65536 bytes, and this one has 65537"):
            open_output(place / "inc", size=UNIT + 1, backing=place / "full", **options)


# ---- transfers ----


def test_short_writes_and_interruptions(place, rng, monkeypatch):
    content = layout(rng, 20 * UNIT + 10, data=0.8)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:5000], offset))
    backup(place / "full", content, format="raw")
    monkeypatch.undo()
    assert read(place / "full") == content


def test_a_write_that_takes_nothing_is_an_error_and_no_loop(place, monkeypatch):
    for name in ("pwrite", "pwritev", "preadv"):
        monkeypatch.setattr(os, name, lambda *_: 0)
    with pytest.raises(OSError, match="nothing was written"):
        fileio.write_all(0, memoryview(b"x"), 0)
    with pytest.raises(OSError, match="nothing was written"):
        fileio.writev_all(0, [b"x"], 0)
    with pytest.raises(OSError, match="it ends at 7"):
        fileio.read_all(0, memoryview(bytearray(1)), 7)


def test_many_buffers(place, rng):
    parts = [rng.randbytes(rng.randrange(4)) for _ in range(3000)]
    fd = os.open(place / "x", os.O_RDWR | os.O_CREAT, 0o600)
    fileio.writev_all(fd, parts, 10)
    os.close(fd)
    assert read(place / "x") == bytes(10) + b"".join(parts)


@pytest.mark.parametrize(("offset", "length"), [(0, UNIT), (1, 5), (100, 3 * MIB), (4096, 4096), (5000, 8192), (0, 0)])
@pytest.mark.parametrize("way", ["punch", "zero-out", "write"])
@pytest.mark.parametrize("kind", ["file", "device"])
def test_zero_range(place, device, monkeypatch, kind, way, offset, length):
    path = place / "device"
    node = device(4 * MIB) if kind == "device" else str(path)
    path.write_bytes(b"\1" * (4 * MIB)) if kind == "file" else None
    before = read(node)
    if way != "punch":
        monkeypatch.setattr(fileio, "_punch", lambda *_: False)
    if way == "write":
        monkeypatch.setattr(fileio, "_zero_out", lambda *_: False)
    fd = os.open(node, os.O_RDWR)
    try:
        fileio.zero_range(fd, offset, length)
    finally:
        os.close(fd)
    assert read(node) == before[:offset] + bytes(length) + before[offset + length :]


# ---- devices ----


@pytest.mark.parametrize("size", [0, 1000, UNIT, UNIT + 512, 20 * UNIT + 700])
@pytest.mark.parametrize("longest", [1, 5])
def test_a_device_is_the_disk_and_what_is_beyond_is_left_alone(place, rng, device, size, longest):
    node = device(4 * MIB)
    before = read(node)
    content = layout(rng, size)
    manifest = backup(node, content, format="raw", rng=rng, manifest=place / "m.json", longest=longest)
    assert read(node) == content + before[size:]
    assert read_manifest(node, place / "m.json") == manifest
    checked = cbwcore.verify_backup(node, manifest=place / "m.json")
    assert checked.chain[0].sha256 == manifest.sha256


def test_what_no_piece_covers_is_zeroed(device):
    node = device(4 * MIB)
    with open_output(node, size=3 * MIB, format="raw") as out:
        for offset in (UNIT, 10 * UNIT):
            out.write(out.begin(offset, UNIT), memoryview(b"\1" * UNIT), b"\0")
        out.finish(images_support.facts())
    expected = bytearray(3 * MIB)
    for offset in (UNIT, 10 * UNIT):
        expected[offset : offset + UNIT] = b"\1" * UNIT
    assert read(node) == bytes(expected) + b"garbage!" * (MIB // 8)


def test_a_device_never_looks_complete_before_it_is(place, device):
    node = device(MIB)
    content = b"\1" * MIB
    with open_output(node, size=MIB, format="raw", manifest=place / "m.json") as out:
        assert read(node, UNIT) == bytes(UNIT)
        store(out, content)
        assert read(node, UNIT) == bytes(UNIT)
        assert not (place / "m.json").exists()
        out.finish(images_support.facts())
    assert read(node) == content
    with open_output(node, size=MIB, format="raw") as out:
        store(out, content)
    assert read(node, UNIT) == bytes(UNIT)


@pytest.mark.parametrize("step", ["sync", "complete", "publish"])
def test_a_device_whose_end_fails(place, device, monkeypatch, step):
    node = device(MIB)
    with open_output(node, size=MIB, format="raw", manifest=place / "m.json") as out:
        store(out, b"\1" * MIB)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == {"sync": 1, "complete": 2, "publish": 1}[step]:
                raise OSError(errno.EIO, "broken")

        if step == "publish":
            monkeypatch.setattr("cbwcore.images.partial.PartialFile.publish", fail)
        else:
            monkeypatch.setattr(raw_output, "sync", fail)
        with pytest.raises(OSError, match="broken"):
            out.finish(images_support.facts())
        monkeypatch.undo()
    assert read(node, UNIT) == bytes(UNIT)
    assert os.listdir(place) == ["device"]


def test_a_gap_that_could_not_be_zeroed_is_tried_again(device, monkeypatch):
    node = device(MIB)
    real, failures = raw_output.zero_range, [1]

    def zero_range(*arguments):
        if failures:
            failures.pop()
            raise OSError(errno.EIO, "broken")
        real(*arguments)

    with open_output(node, size=MIB, format="raw") as out:
        piece = out.begin(8 * UNIT, UNIT)
        monkeypatch.setattr(raw_output, "zero_range", zero_range)
        with pytest.raises(OSError, match="broken"):
            out.write(piece, memoryview(b"\1" * UNIT), b"\0")
        out.write(piece, memoryview(b"\1" * UNIT), b"\0")
        out.finish(images_support.facts())
    assert read(node) == bytes(8 * UNIT) + b"\1" * UNIT + bytes(7 * UNIT)


def test_pieces_that_threads_begin_side_by_side(device, in_threads):
    """No piece is in a gap before another."""
    node = device(4 * MIB)
    with open_output(node, size=4 * MIB, format="raw") as out:
        offsets = iter(range(0, 4 * MIB, 2 * UNIT))
        lock = threading.Lock()

        def run():
            while True:
                with lock:
                    offset = next(offsets, None)
                    if offset is None:
                        return
                    piece = out.begin(offset, UNIT)
                out.write(piece, memoryview(b"\1" * UNIT), b"\0")

        in_threads(*[run] * 6)
        out.finish(images_support.facts())
    assert read(node) == (b"\1" * UNIT + bytes(UNIT)) * 32


def test_devices_that_are_refused(place, device):
    node = device(MIB)
    with pytest.raises(ConfigError, match="is 1048576 bytes, less than the disk's 1048577"):
        open_output(node, size=MIB + 1, format="raw")
    with pytest.raises(ConfigError, match="the format there is raw"):
        open_output(node, size=MIB, format="qcow2")
    with pytest.raises(ConfigError, match="itself, which is needed"):
        open_output(node, size=MIB, format="raw", apart=[place / "device"])
    with cbwcore.Disk(node), pytest.raises(ConfigError, match="in use"):
        open_output(node, size=MIB, format="raw")
    with (
        open_output(node, size=0, format="raw"),
        pytest.raises(ConfigError, match="in use"),
    ):
        open_output(node, size=0, format="raw")
    (place / "m.json").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="is there already"):
        open_output(node, size=MIB, format="raw", manifest=place / "m.json")
    assert read(node) == b"garbage!" * (MIB // 8)


def test_a_link_to_a_device_is_the_device(place, device):
    (place / "link").symlink_to(device(MIB))
    backup(place / "link", b"\2" * MIB, format="raw")
    assert read(place / "device") == b"\2" * MIB
    assert (place / "link").is_symlink()


def test_a_device_as_a_parent_is_refused(place, device):
    """Its manifest lies elsewhere; nothing could find it from the child."""
    node = device(MIB)
    backup(node, b"\2" * MIB, format="raw", manifest=place / "m.json")
    with pytest.raises(StateError, match="no finished backup"):
        open_output(place / "inc", size=MIB, format="qcow2", layered=True, backing=node)
