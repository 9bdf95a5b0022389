"""qcow2 images, judged by qemu-img and by our own reader, for every layout that there can be."""

import json
import os
import random
import struct
import threading
import tracemalloc

import images_support
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images_support import UNIT, backup, check_image, layout, qemu_content, qemu_img

import cbwcore
from cbwcore import ConfigError
from cbwcore._cbwcore import zero_units
from cbwcore.images import qcow2_writer
from cbwcore.images.output import open_output
from cbwcore.images.qcow2 import L2_SPAN, REFCOUNTS, compressed_entry, compressed_range
from cbwcore.images.qcow2_writer import Qcow2Writer, Refcounts, backing_name

SIZES = [0, 1, 511, 512, 513, UNIT - 1, UNIT, UNIT + 1, 5 * UNIT + 1234, 40 * UNIT]
QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def restored(image, place):
    """The content by our own reader."""
    cbwcore.restore(image, place / "restored", overwrite=True, verify=True)
    return (place / "restored").read_bytes()


def assert_image(path, content, place):
    check_image(path)
    assert qemu_content(path, place / "raw", len(content)) == content
    assert restored(path, place) == content


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(place, rng, size, compress):
    content = layout(rng, size)
    backup(place / "full", content, compress=compress, rng=rng)
    assert_image(place / "full", content, place)
    assert json.loads(qemu_img("info", "--output=json", place / "full"))["virtual-size"] == -(-size // 512) * 512


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("layered", [False, True])
def test_all_zeroes(place, compress, layered):
    content = bytes(100 * UNIT + 9)
    if layered:
        backup(place / "full", b"\1" * len(content))
        backup(place / "it", content, dirty=range(101), backing=place / "full", compress=compress)
    else:
        backup(place / "it", content, compress=compress)
    assert_image(place / "it", content, place)
    assert os.path.getsize(place / "it") <= 6 * UNIT


clusters = st.lists(
    st.tuples(st.sampled_from(["random", "text", "zero", "tiny"]), st.booleans(), st.booleans()), max_size=24
)


def content_of(kinds, tail, rng):
    parts = []
    for kind in kinds:
        parts.append(
            {
                "random": lambda: rng.randbytes(UNIT),
                "text": lambda: (b"%d, " % rng.randrange(1000)) * (UNIT // 2),
                "zero": lambda: bytes(UNIT),
                "tiny": lambda: b"\1" + bytes(UNIT - 1),
            }[kind]()[:UNIT].ljust(UNIT, b"\0")
        )
    content = b"".join(parts)
    return content[: len(content) - tail] if content else b""


@QUICK
@given(
    clusters=clusters,
    tail=st.sampled_from([0, 1, 100, 512, 65000]),
    compress=st.sampled_from([None, "zstd"]),
    longest=st.integers(1, 17),
    seed=st.integers(0, 2**32),
)
def test_any_layout_in_any_order(tmp_path_factory, clusters, tail, compress, longest, seed):
    """Full, two layers on it with random dirty clusters; each equals its own disk, for QEMU and for us."""
    place, rng = tmp_path_factory.mktemp("qcow2"), random.Random(seed)
    content = content_of([kind for kind, _, _ in clusters], tail, rng)
    backup(place / "0", content, compress=compress, rng=rng, longest=longest)
    contents = [content]
    for layer in (1, 2):
        dirty = [i for i, flags in enumerate(clusters) if flags[layer]]
        new = bytearray(content)
        for i in dirty:
            part = content_of([rng.choice(["random", "text", "zero", "tiny"])], 0, rng)
            new[i * UNIT : (i + 1) * UNIT] = part[: len(new[i * UNIT : (i + 1) * UNIT])]
        content = bytes(new)
        contents.append(content)
        other = rng.choice([None, "zstd"])
        backup(
            place / f"{layer}", content, dirty=dirty, backing=place / f"{layer - 1}", compress=other, longest=longest
        )
    for layer, expected in enumerate(contents):
        assert_image(place / f"{layer}", expected, place)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_compare_and_map(place, rng, compress):
    content = layout(rng, 30 * UNIT)
    (place / "disk").write_bytes(content)
    backup(place / "full", content, compress=compress)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", place / "disk", place / "full")
    extents = json.loads(qemu_img("map", "--output=json", place / "full"))
    zeroes = zero_units(content, UNIT)
    for extent in extents:
        for index in range(extent["start"] // UNIT, -(-(extent["start"] + extent["length"]) // UNIT)):
            assert extent["data"] != bool(zeroes[index])


def test_layers_say_whose_each_cluster_is(place, rng):
    content = bytes(UNIT) + rng.randbytes(5 * UNIT)
    new = content[:UNIT] + bytes(UNIT) + rng.randbytes(UNIT) + content[3 * UNIT :]
    backup(place / "full", content)
    backup(place / "inc", new, dirty=[0, 1, 2], backing=place / "full")
    extents = json.loads(qemu_img("map", "--output=json", place / "inc"))
    told = [(e["start"] // UNIT, e["length"] // UNIT, e["depth"], e["zero"]) for e in extents]
    assert told == [(0, 2, 0, True), (2, 1, 0, False), (3, 3, 1, False)]


def test_a_chain_of_three_as_qemu_tells_it(place, rng):
    content = layout(rng, 10 * UNIT)
    backup(place / "full.qcow2", content, compress="zstd")
    (place / "sub").mkdir()
    backup(place / "sub" / "mon.qcow2", content, dirty=[1], backing=place / "full.qcow2")
    backup(place / "tue.qcow2", content, dirty=[2], backing=place / "sub" / "mon.qcow2", compress="zstd")
    chain = json.loads(qemu_img("info", "--backing-chain", "--output=json", place / "tue.qcow2"))
    assert [link.get("backing-filename") for link in chain] == ["sub/mon.qcow2", "../full.qcow2", None]
    assert [link.get("backing-filename-format") for link in chain] == ["qcow2", "qcow2", None]
    assert [link["format-specific"]["data"]["compression-type"] for link in chain] == ["zstd", "zlib", "zstd"]
    assert [link["format-specific"]["data"]["refcount-bits"] for link in chain] == [16, 16, 16]
    assert_image(place / "tue.qcow2", content, place)


def test_a_raw_parent(place, rng):
    content = layout(rng, 10 * UNIT + 300)
    backup(place / "full.img", content, format="raw")
    new, dirty = images_support.changed(rng, content)
    backup(place / "inc", new, dirty=dirty, backing=place / "full.img")
    assert json.loads(qemu_img("info", "--output=json", place / "inc"))["backing-filename-format"] == "raw"
    assert_image(place / "inc", new, place)


NAMES = [
    b"nbd:full",
    b"json:{}",
    b"a:b/c",
    b"file:x",
    b"caf\xe9\xff",
    b" space \n",
    b"-f",
    b"%s\\",
    b"\xf0\x9f\x92\xbe",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_with_any_bytes(place, rng, name):
    """QEMU takes a name with a colon before any slash for a protocol; ours never are."""
    content = layout(rng, 4 * UNIT)
    full = os.fsencode(place) + b"/" + name
    os.makedirs(os.path.dirname(full), exist_ok=True)
    backup(os.fsdecode(full), content)
    backup(place / "inc", content, dirty=[0], backing=os.fsdecode(full))
    assert_image(place / "inc", content, place)
    top = os.fsdecode(full) + ":2"
    backup(top, content, dirty=[1], backing=place / "inc")
    assert restored(top, place) == content


def test_backing_names():
    assert backing_name("/a/b/new", "/a/b/full") == b"full"
    assert backing_name("/a/b/new", "/a/c/full") == b"../c/full"
    assert backing_name("/a/b/new", "/a/b/nbd:x") == b"./nbd:x"
    assert backing_name("/a/b/new", "/a/b/d/nbd:x") == b"d/nbd:x"
    with pytest.raises(ConfigError, match="longer than 1023"):
        backing_name("/new", "/" + "d" * 200 + ("/" + "e" * 200) * 5)


def test_the_image_is_opened_by_way_of_a_link_to_its_folder(place, rng):
    content = layout(rng, 3 * UNIT)
    (place / "real" / "deep").mkdir(parents=True)
    (place / "link").symlink_to("real/deep")
    backup(place / "full", content)
    backup(place / "link" / "inc", content, dirty=[0], backing=place / "full")
    assert_image(place / "link" / "inc", content, place)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_16_tib_sparse(place, rng, compress):
    size = 16 << 40
    offsets = [0, L2_SPAN - UNIT, L2_SPAN, 5 << 40, size - UNIT]
    data = {offset: rng.randbytes(1000) + bytes(UNIT - 1000) for offset in offsets}
    tracemalloc.start()
    with open_output(place / "full", size=size, format="qcow2", compress=compress) as out:
        for offset in offsets:
            piece = out.begin(offset, UNIT)
            out.write(piece, memoryview(data[offset]), b"\0")
        manifest = out.finish(images_support.facts())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert (manifest.data_bytes, manifest.zero_bytes) == (5 * UNIT, size - 5 * UNIT)
    check_image(place / "full")
    assert os.stat(place / "full").st_size < 4 << 20
    extents = json.loads(qemu_img("map", "--output=json", place / "full"))
    told = [at for e in extents if e["data"] for at in range(e["start"], e["start"] + e["length"], UNIT)]
    assert told == offsets
    cbwcore.restore(place / "full", place / "restored", verify=True)
    with open(place / "restored", "rb") as f:
        for offset in offsets:
            f.seek(offset)
            assert f.read(UNIT) == data[offset]
    assert os.stat(place / "restored").st_blocks * 512 < 1 << 20


def test_an_empty_16_tib_disk(place):
    with open_output(place / "full", size=16 << 40, format="qcow2") as out:
        out.finish(images_support.facts())
    check_image(place / "full")
    assert cbwcore.verify_backup(place / "full").complete


def test_too_large_for_the_format_is_refused(place, unchanged):
    with unchanged(), pytest.raises(ConfigError, match="more than a qcow2 image can have"):
        open_output(place / "full", size=1 << 62, format="qcow2")


def test_zero_pieces_across_tables(place):
    """A piece of zeroes that fills whole L2 tables, and parts of two more."""
    size = 4 * L2_SPAN
    with open_output(place / "full", size=size, format="qcow2") as out:
        out.finish(images_support.facts())
    with open_output(place / "inc", size=size, format="qcow2", backing=place / "full", layered=True) as out:
        first = out.begin(0, UNIT)
        piece = out.begin(L2_SPAN - UNIT, 2 * L2_SPAN + 2 * UNIT)
        out.write_zeroes(piece)
        out.write(first, memoryview(bytes(UNIT)), b"\1")
        manifest = out.finish(images_support.facts("incremental"))
    assert manifest.zero_bytes == 2 * L2_SPAN + 3 * UNIT
    check_image(place / "inc")
    extents = json.loads(qemu_img("map", "--output=json", place / "inc"))
    assert [(e["start"], e["depth"]) for e in extents] == [
        (0, 0),
        (UNIT, 1),
        (L2_SPAN - UNIT, 0),
        (3 * L2_SPAN + UNIT, 1),
    ]
    cbwcore.verify_backup(place / "inc")


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_tables_are_written_as_soon_as_they_are_final(place, compress):
    """Memory does not grow with the disk: 64 GiB, a cluster of data in each table's range, nothing of it kept."""
    size, data = 128 * L2_SPAN, memoryview(b"\1" * UNIT)
    with open_output(place / "full", size=size, format="qcow2", compress=compress) as out:
        for offset in range(0, size, L2_SPAN):
            out.write(out.begin(offset, UNIT), data, b"\0")
            assert len(out._store._tables) <= 2
        out.finish(images_support.facts())
    check_image(place / "full")
    assert cbwcore.verify_backup(place / "full").chain[0].data_bytes == 128 * UNIT


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_threads_across_many_tables(place, rng, in_threads, compress):
    """Pieces of data and of zeroes around the borders of L2 tables, while others write those tables."""
    size = 24 * L2_SPAN
    with open_output(place / "full", size=size, format="qcow2") as out:
        out.finish(images_support.facts())
    borders = [at for i in range(1, 24) for at in (i * L2_SPAN - 4 * UNIT, i * L2_SPAN + 100 * UNIT)]
    data = {at: rng.randbytes(5000) * 105 for at in borders}
    with open_output(
        place / "inc", size=size, format="qcow2", backing=place / "full", layered=True, compress=compress
    ) as out:
        lock, offsets = threading.Lock(), iter(borders)

        def run():
            while True:
                with lock:
                    at = next(offsets, None)
                    if at is None:
                        return
                    piece, zeroes = out.begin(at, 8 * UNIT), out.begin(at + 8 * UNIT, 64 * UNIT)
                view = memoryview(data[at])[: 8 * UNIT]
                out.write_zeroes(zeroes)
                out.write(piece, view, zero_units(view, UNIT))

        in_threads(*[run] * 6)
        manifest = out.finish(images_support.facts("incremental"))
    assert (manifest.data_bytes, manifest.zero_bytes) == (len(borders) * 8 * UNIT, len(borders) * 64 * UNIT)
    check_image(place / "inc")
    cbwcore.restore(place / "inc", place / "restored")
    with open(place / "restored", "rb") as f:
        for at in borders:
            f.seek(at)
            assert f.read(72 * UNIT) == data[at][: 8 * UNIT] + bytes(64 * UNIT)


def test_a_table_that_could_not_be_written_is_written_later(place, monkeypatch):
    """The write that met it is refused, and may be made again."""
    real, failures = qcow2_writer.write_all, [1, 1]

    def write_all(fd, view, offset):
        if len(view) == UNIT and failures:
            failures.pop()
            raise OSError(28, "full")
        real(fd, view, offset)

    monkeypatch.setattr(qcow2_writer, "write_all", write_all)
    data = memoryview(b"\1" * UNIT)
    with open_output(place / "full", size=3 * L2_SPAN, format="qcow2") as out:
        out.write(out.begin(0, UNIT), data, b"\0")
        piece = out.begin(L2_SPAN, UNIT)
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                out.write(piece, data, b"\0")
        out.write(piece, data, b"\0")
        out.write(out.begin(2 * L2_SPAN, UNIT), data, b"\0")
        out.finish(images_support.facts())
    assert failures == []
    check_image(place / "full")
    assert cbwcore.verify_backup(place / "full").chain[0].data_bytes == 3 * UNIT


def test_refcount_blocks_are_written_as_soon_as_they_are_final(place, monkeypatch):
    """A file of more than 2 GiB, most of it skipped as if it had been taken by pieces."""
    data = memoryview(b"\1" * UNIT)
    with open_output(place / "full", size=L2_SPAN, format="qcow2") as out:
        writer = out._store
        for i in range(4):
            out.write(out.begin(i * UNIT, UNIT), data, b"\0")
            writer._end += 3 * REFCOUNTS // 2
            assert len(writer._refcounts.blocks) <= 2
        assert len(writer._refcounts.table) >= 2
        out.finish(images_support.facts())
    check_image(place / "full")
    cbwcore.verify_backup(place / "full")


def test_a_block_in_which_something_is_under_way_is_not_final(place):
    fd = os.open(place / "x", os.O_RDWR | os.O_CREAT, 0o600)
    writer = Qcow2Writer(fd, L2_SPAN, compress=None, layered=False, backing=None, backing_format=None)
    writer._under_way[0] = 7
    writer._take(2 * REFCOUNTS)
    assert writer._final_blocks() == []
    del writer._under_way[0]
    assert writer._final_blocks() == [0, 1]
    writer._tail = 5 * UNIT + 1  # the next compressed cluster may use the rest
    assert writer._final_blocks() == []
    os.close(fd)


def test_refcounts_across_blocks():
    counts = Refcounts()
    counts.add(REFCOUNTS - 1, 2)
    counts.add(REFCOUNTS, 1)
    assert counts.blocks[0][-1] == 1
    assert counts.blocks[1][0] == 2


@given(st.integers(UNIT, 2**48), st.integers(1, UNIT - 1))
def test_entries_of_compressed_clusters(offset, length):
    """The 54 bit rule: the range that the entry tells begins there, holds the data, and ends in its last sector."""
    found, rest = compressed_range(compressed_entry(offset, length))
    assert found == offset
    assert length <= rest < length + 512
    assert (offset + rest) % 512 == 0


def test_a_compressed_cluster_that_would_not_be_smaller_is_stored_plain(place, rng):
    content = rng.randbytes(UNIT) + b"a" * UNIT + rng.randbytes(UNIT)
    backup(place / "full", content, compress="zstd")
    extents = json.loads(qemu_img("map", "--output=json", place / "full"))
    assert check_image(place / "full")["compressed-clusters"] == 1
    assert len([e for e in extents if "offset" in e]) >= 2
    assert_image(place / "full", content, place)


def test_compressed_clusters_lie_close_together(place, rng):
    """Across the borders of host clusters, too: half compressible ones take half of the space."""
    content = b"".join(rng.randbytes(UNIT // 2 + 2000) + bytes(UNIT // 2 - 2000) for _ in range(64))
    backup(place / "full", content, compress="zstd", longest=4)
    assert os.path.getsize(place / "full") < 64 * (UNIT // 2 + 3000) + 6 * UNIT


def test_host_clusters_shared_by_many_compressed_ones(place):
    content = b"".join(bytes([1 + i % 250]) * UNIT for i in range(800))
    backup(place / "full", content, compress="zstd")
    assert os.path.getsize(place / "full") <= 8 * UNIT
    check_image(place / "full")
    assert restored(place / "full", place) == content


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_threads(place, rng, compress):
    content = layout(rng, 200 * UNIT + 3, data=0.8)
    view = memoryview(content)
    with open_output(place / "full", size=len(content), format="qcow2", compress=compress) as out:
        lock, pieces = threading.Lock(), images_support.pieces_of(len(content), longest=5)

        def run():
            while True:
                with lock:
                    offset, length = next(pieces, (None, 0))
                    if offset is None:
                        return
                    piece = out.begin(offset, length)
                part = view[offset : offset + length]
                out.write(piece, part, zero_units(part, UNIT))

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        out.finish(images_support.facts())
    assert_image(place / "full", content, place)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_piece_that_failed_is_written_again_into_its_space(place, rng, compress, monkeypatch):
    content = rng.randbytes(UNIT) + b"text" * (UNIT // 4) + rng.randbytes(2 * UNIT)
    backup(place / "once", content, compress=compress)
    real, failures = os.pwritev, [OSError(28, "full")] * 3

    def pwritev(fd, buffers, offset):
        if failures:
            raise failures.pop()
        return real(fd, buffers, offset)

    with open_output(place / "again", size=len(content), format="qcow2", compress=compress) as out:
        piece = out.begin(0, len(content))
        monkeypatch.setattr(os, "pwritev", pwritev)
        for _ in range(3):
            with pytest.raises(OSError, match="full") as e:
                out.write(piece, memoryview(content), bytes(4))
            assert e.value.filename == str(place / "again")
        out.write(piece, memoryview(content), bytes(4))
        assert out.data_bytes == len(content)
        out.finish(images_support.facts())
    assert_image(place / "again", content, place)
    assert os.path.getsize(place / "again") == os.path.getsize(place / "once")


def test_short_writes(place, rng, monkeypatch):
    content = layout(rng, 20 * UNIT + 10, data=0.8)
    write, writev = os.pwrite, os.pwritev
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:5000], offset))
    monkeypatch.setattr(
        os, "pwritev", lambda fd, parts, offset: writev(fd, [part[:7001] for part in parts[:1]], offset)
    )
    for compress in (None, "zstd"):
        backup(place / f"{compress}", content, compress=compress)
    monkeypatch.undo()
    for compress in (None, "zstd"):
        assert_image(place / f"{compress}", content, place)


def test_a_partial_is_no_qcow2_image(place, rng):
    content = layout(rng, 9 * UNIT)
    out = open_output(place / "full", size=len(content), format="qcow2")
    images_support.store(out, content)
    out._store.seal("0" * 32)
    out.abort(keep=True)
    with open(place / "full.partial", "rb") as f:
        assert f.read(UNIT) == bytes(UNIT)
    assert json.loads(qemu_img("info", "--output=json", place / "full.partial"))["format"] == "raw"


def test_the_header_is_what_qemu_would_write(place):
    backup(place / "full", b"\1" * UNIT, compress="zstd")
    with open(place / "full", "rb") as f:
        header = f.read(112)
    assert header[:8] == b"QFI\xfb\0\0\0\3"
    incompatible, compatible, autoclear, order, length = struct.unpack(">QQQII", header[72:104])
    assert (incompatible, compatible, autoclear, order, length) == (8, 0, 0, 4, 112)
    assert header[104:112] == b"\1" + bytes(7)
