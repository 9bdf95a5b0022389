"""What may be exported, limits, constants: refused by name where they cannot be."""

import struct

import pytest
from handshake_support import BASE, MIB, SIZE

import cbwcore
from cbwcore.nbd import NbdLimits
from cbwcore.nbd import protocol as nbd
from cbwcore.nbd.exports import Export, Exports

# ---- exports ----


def test_what_an_export_is(make_disk):
    disk = make_disk(SIZE)
    bitmap = disk.bitmaps.add("b")
    mine = cbwcore.DirtyBitmap(SIZE, name="mine")
    export = Export("", disk, bitmaps=["b", mine])
    assert (export.name, export.source, export.size) == ("", disk, SIZE)
    assert (export.writable, export.discard, export.description) == (False, False, "")
    assert export.contexts == {BASE: None, "qemu:dirty-bitmap:b": bitmap, "qemu:dirty-bitmap:mine": mine}
    assert export.block_sizes(32 * MIB) == (1, 4096, 32 * MIB)
    snapshot = disk.snapshot()
    assert Export("n" * 1023, snapshot, bitmaps=["b"], discard=True).source is snapshot
    assert Export("€" * 341, disk, writable=True, description="d" * 4096).writable


def refused_exports(disk, read_only, snapshot):
    other = cbwcore.DirtyBitmap(512, name="other")
    nameless = cbwcore.DirtyBitmap(SIZE)
    return {
        "1024 bytes": ("n" * 1024, disk, {}, "1023.*1024"),
        "UTF-8 counts": ("€" * 342, disk, {}, "1026"),
        "a NUL": ("a\0b", disk, {}, "NUL"),
        "a surrogate": ("\udc80", disk, {}, "UTF-8"),
        "no string": (b"disk", disk, {}, "string"),
        "None": (None, disk, {}, "string"),
        "a path": ("x", disk.path, {}, "str"),
        "a writable snapshot": ("x", snapshot, {"writable": True}, "snapshot"),
        "a writable read-only disk": ("x", read_only, {"writable": True}, "read-only"),
        "discard of a disk": ("x", disk, {"discard": True}, "discard"),
        "an unknown bitmap": ("x", disk, {"bitmaps": ["nobody"]}, "'nobody'"),
        "a bitmap of another size": ("x", disk, {"bitmaps": [other]}, f"512.*{SIZE}"),
        "a bitmap without a name": ("x", disk, {"bitmaps": [nameless]}, "name ''"),
        "no bitmap": ("x", disk, {"bitmaps": [7]}, "int"),
        "a bitmap twice": ("x", disk, {"bitmaps": ["b", "b"]}, "two"),
        "a long description": ("x", disk, {"description": "d" * 4097}, "4097.*4096"),
        "a description with a NUL": ("x", disk, {"description": "\0"}, "NUL"),
        "a description of no string": ("x", disk, {"description": 7}, "string"),
        "a description of no UTF-8": ("x", disk, {"description": "\ud800"}, "UTF-8"),
    }


@pytest.mark.parametrize("case", refused_exports(*[type("", (), {"path": ""})] * 3))
def test_a_bad_export_is_refused(make_disk, make_image, case):
    disk = make_disk(SIZE)
    disk.bitmaps.add("b")
    read_only = cbwcore.Disk(make_image(SIZE, "read-only.img"), read_only=True)
    with read_only:
        name, source, arguments, match = refused_exports(disk, read_only, disk.snapshot())[case]
        with pytest.raises(cbwcore.ConfigError, match=match):
            Export(name, source, **arguments)


def test_what_is_closed_is_not_exported(make_disk):
    disk = make_disk(SIZE)
    snapshot = disk.snapshot()
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        Export("x", snapshot)
    armed = disk.snapshot()
    disk.close()
    for source in (disk, armed):
        with pytest.raises(ValueError, match="closed"):
            Export("x", source)


@pytest.mark.parametrize(("align", "preferred"), [(1, 4096), (512, 4096), (4096, 4096), (16384, 16384), (MIB, 4096)])
def test_the_preferred_block_size_is_the_storages(make_disk, align, preferred):
    disk = make_disk(SIZE)
    disk._file = disk._file._replace(align=align)
    assert Export("x", disk).block_sizes(65536) == (1, preferred, 65536)
    disk.snapshot(cluster_size=MIB)
    assert Export("x", disk.snapshots[0]).block_sizes(65536) == (1, preferred, 65536)


def test_the_registry_of_exports(make_disk):
    disk = make_disk(512)
    exports = Exports()
    assert (exports.names(), exports.find(""), exports.find("x")) == ((), None, None)
    for name in "bac":
        exports.add(Export(name, disk))
    assert exports.names() == ("b", "a", "c")
    assert exports.find("").name == "b"
    with pytest.raises(cbwcore.ConfigError, match="'a' already"):
        exports.add(Export("a", disk))
    assert exports.remove("b").name == "b"
    for name in ("b", ""):
        with pytest.raises(cbwcore.ConfigError, match=repr(name)):
            exports.remove(name)
    assert exports.find("").name == "a"
    assert exports.find("b") is None


def test_the_registry_from_many_threads(make_disk, in_threads):
    disk = make_disk(512)
    exports = Exports()
    exports.add(Export("stays", disk))

    def work(name):
        for _ in range(200):
            exports.add(Export(name, disk))
            assert {"stays", name} <= {export.name for export in exports}
            assert exports.find("").name == "stays"
            exports.remove(name)

    in_threads(*(lambda name=name: work(name) for name in "abcd"))
    assert exports.names() == ("stays",)


# ---- limits ----


def test_the_default_limits_are_those_of_the_design():
    limits = NbdLimits()
    assert (limits.request, limits.drain, limits.bytes_in_flight) == (32 * MIB, 64 * MIB, 256 * MIB)
    assert (limits.connections, limits.negotiating, limits.options, limits.queries) == (100, 16, 32, 64)
    assert (limits.handshake_seconds, limits.stall_seconds) == (10.0, 30.0)
    assert (limits.option_bytes, limits.string_bytes, limits.extents) == (65536, 4096, 1 << 17)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in NbdLimits.__struct_fields__ for value in (0, -1, "1", None, float("nan"), 1 << 70)],
        *[(name, 1e9) for name in NbdLimits.__struct_fields__],
        ("string_bytes", 4097),
        ("handshake_seconds", float("inf")),
        ("drain", 32 * MIB - 1),
        ("bytes_in_flight", 32 * MIB - 1),
    ],
)
def test_a_bad_limit_is_refused_and_named(name, value):
    with pytest.raises(cbwcore.ConfigError, match=name):
        NbdLimits(**{name: value})


def test_limits_do_not_change():
    with pytest.raises(AttributeError):
        NbdLimits().request = 5


def test_the_constants_of_the_specification():
    assert tuple(struct.unpack(">QQ", b"NBDMAGICIHAVEOPT")) == (nbd.NBD_MAGIC, nbd.NBD_OPTS_MAGIC)
    assert nbd.NBD_REP_MAGIC == 0x3E889045565A9
