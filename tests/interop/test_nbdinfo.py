"""nbdinfo (libnbd) says of the exports what the server was told, and of their content what is there."""

import pytest
from interop_support import (
    CLUSTER,
    KIB,
    MIB,
    ODD,
    assert_status,
    joined,
    mixed,
    nbd_map,
    nbd_status,
    pattern,
    status_runs,
)
from programs_support import run_json

from cbwcore.nbd import NbdLimits

EVEN = 4 * MIB
TRUE, FALSE, ERROR = 0, 2, 1  # nbdinfo's exit statuses
GUEST = {"cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero"}
READER = {"cache", "df", "multi-conn"}
WRITER = {"fast-zero", "trim", "write", "zero"}  # what a read-only export must not offer


@pytest.fixture(autouse=True)
def _nbdinfo(program):
    program("nbdinfo")


def export_of(uri):
    (export,) = run_json("nbdinfo", "--json", uri)["exports"]
    return export


@pytest.mark.parametrize("size", [ODD, EVEN, 1, 512, CLUSTER - 1])
def test_sizes_to_the_byte(serve, image, run, size):
    server = serve(image(pattern(size)))
    for name in ("disk", "snapshot", ""):
        assert run("nbdinfo", "--size", server.uri(name)).stdout == f"{size}\n"
        assert export_of(server.uri(name))["export-size"] == size


def test_facts_of_the_disk(serve, image):
    server = serve(image(pattern(ODD)))
    facts = run_json("nbdinfo", "--json", server.uri())
    assert (facts["protocol"], facts["TLS"], facts["structured"]) == ("newstyle-fixed", False, True)
    (export,) = facts["exports"]
    assert export["export-name"] == "disk"
    assert export["contexts"] == ["base:allocation"]
    assert export["is_read_only"] is False
    assert export["is_rotational"] is False
    flags = {name for name in export if name.startswith("can_") and export[name]}
    assert flags == {f"can_{name.replace('-', '_')}" for name in GUEST - {"write"}}
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] >= 4 * KIB
    assert export["block_size_maximum"] == 32 * MIB


def test_facts_of_the_snapshot(serve, image):
    server = serve(image(pattern(ODD)))
    export = export_of(server.uri("snapshot"))
    assert export["contexts"] == ["base:allocation"]
    assert export["is_read_only"] is True
    assert {name for name in READER if export[f"can_{name.replace('-', '_')}"]} == READER
    assert not any(export[f"can_{name}"] for name in ("fast_zero", "trim", "zero"))
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 * MIB)


def assert_can(run, uri, can, cannot):
    for what in can | {"read", "connect", "structured-reply"}:
        run("nbdinfo", "--can", what, uri, status=TRUE)
    for what in cannot:
        run("nbdinfo", "--can", what, uri, status=FALSE)
    run("nbdinfo", "--is", "read-only", uri, status=FALSE if "write" in can else TRUE)
    run("nbdinfo", "--is", "tls", uri, status=FALSE)
    run("nbdinfo", "--is", "rotational", uri, status=FALSE)


def test_can(serve, image, run):
    server = serve(image(pattern(EVEN)))
    assert_can(run, server.uri(), GUEST, set())
    assert_can(run, server.uri("snapshot"), READER, WRITER)


def test_discard_is_trim_of_the_snapshot(serve, image, run):
    server = serve(image(pattern(EVEN)), "--discard")
    assert_can(run, server.uri("snapshot"), READER | {"trim"}, WRITER - {"trim"})


def test_read_only_disk(serve, image, run):
    server = serve(image(pattern(EVEN)), "--read-only", "--no-snapshot", target=None)
    assert export_of(server.uri())["is_read_only"] is True
    assert_can(run, server.uri(), READER, WRITER)
    listed = run_json("nbdinfo", "--json", "--list", server.uri())["exports"]
    assert [export["export-name"] for export in listed] == ["disk"]


def test_list(serve, image):
    server = serve(image(pattern(ODD)))
    listed = run_json("nbdinfo", "--json", "--list", server.uri())["exports"]
    assert [(e["export-name"], e["export-size"], e["is_read_only"]) for e in listed] == [
        ("disk", ODD, False),
        ("snapshot", ODD, True),
    ]


def test_list_of_many(host, image, run):
    """Names of any script, with what URIs quote in them, up to the longest; and the first is the default.

    nbdinfo looks at all of them in one negotiation, with two options for each."""
    here = host(image(pattern(EVEN)), limits=NbdLimits(options=100))
    names = [
        "first",
        "snapshot of 12:00",
        "a/b?c=d&e#f%41+",
        "ディスク",
        "é" * 511 + "x",
        *(f"n{i}" for i in range(40)),
    ]
    for i, name in enumerate(names):
        snapshot = here.disk.snapshot()
        here.server.add_export(name, snapshot, description=f"number {i}")
    listed = run_json("nbdinfo", "--json", "--list", "--no-content", here.uri(""))["exports"]
    assert [e["export-name"] for e in listed] == names
    assert [e["description"] for e in listed] == [f"number {i}" for i in range(len(names))]
    for name in names[:5]:
        assert export_of(here.uri(name))["export-name"] == name
    for uri in here.server.uris[:5]:  # the server's own quoting is what libnbd reads
        run("nbdinfo", "--size", uri)


def test_unknown_export(serve, image, run):
    server = serve(image(pattern(EVEN)))
    for name in ("nothing", "Disk", "disk ", "x" * 1000):
        done = run("nbdinfo", "--size", server.uri(name), status=ERROR)
        assert "No such file or directory" in done.stderr
    run("nbdinfo", "--size", server.uri())


@pytest.mark.parametrize("size", [ODD, EVEN])
def test_map(serve, image, size):
    """Before any write both exports have exactly the file's holes."""
    content = mixed(size)
    server = serve(image(content))
    for name in ("disk", "snapshot"):
        status = nbd_status(server.uri(name))
        assert joined(status) == status_runs(content)
        assert assert_status(status, content) > size // 4


def test_map_of_all_holes_and_of_none(serve, image):
    holes = serve(image(bytes(ODD), "holes.img"))
    assert joined(nbd_status(holes.uri("snapshot"))) == [(0, ODD, True)]
    data = serve(image(pattern(ODD), "data.img"))
    assert joined(nbd_status(data.uri("snapshot"))) == [(0, ODD, False)]


def test_map_after_guest_writes(serve, image, run, program):
    """The disk's map follows the guest, the snapshot's agrees with T0 (R20)."""
    program("qemu-io")
    t0 = mixed(ODD)
    server = serve(image(t0))
    run(
        *("qemu-io", "-f", "raw", server.uri()),
        *("-c", "write -z -u 1M 1M", "-c", "write -P 0x5a 3M 1M", "-c", "discard 5M 128k", "-c", "write -z 6M 4k"),
        *("-c", "write -P 0x5a 2093056 8k"),  # across the end of what was zeroed
    )
    assert_status(nbd_status(server.uri("snapshot")), t0)
    now = bytearray(t0)
    now[1 * MIB : 2 * MIB] = bytes(MIB)
    now[3 * MIB : 4 * MIB] = b"\x5a" * MIB
    now[5 * MIB : 5 * MIB + 128 * KIB] = bytes(128 * KIB)
    now[6 * MIB : 6 * MIB + 4 * KIB] = bytes(4 * KIB)
    now[2093056 : 2093056 + 8 * KIB] = b"\x5a" * (8 * KIB)
    assert_status(nbd_status(server.uri()), bytes(now))


def test_totals(serve, image):
    content = mixed(ODD)
    zero = sum(length for _, length, is_zero in status_runs(content) if is_zero)
    server = serve(image(content))
    totals = run_json("nbdinfo", "--json", "--map", "--totals", server.uri("snapshot"))
    assert {t["type"]: t["size"] for t in totals} == {0: ODD - zero, 3: zero}


def test_map_of_more_extents_than_one_reply_holds(serve, image):
    """Every second page is data: 32768 extents of 4 KiB, in several replies."""
    page = pattern(4 * KIB)
    content = (page + bytes(4 * KIB)) * (16384)
    server = serve(image(content))
    assert joined(nbd_status(server.uri("snapshot"))) == status_runs(content)


# ---- dirty bitmaps ----


def test_dirty_bitmap(host, image, run, program):
    program("qemu-io")
    here = host(image(pattern(ODD)))
    here.disk.bitmaps.add("b0")
    here.disk.bitmaps.add("fine grained", granularity=4096)
    here.server.add_export("disk", here.disk, writable=True, bitmaps=["b0", "fine grained"])
    contexts = export_of(here.uri())["contexts"]
    assert sorted(contexts) == ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:fine grained"]
    assert joined(nbd_map(here.uri(), "qemu:dirty-bitmap:b0")) == [(0, ODD, 0)]
    tail = ODD - 300
    run(
        *("qemu-io", "-f", "raw", here.uri(), "-c", f"write -P 1 {3 * CLUSTER + 100} 50", "-c", "write -z 1M 100k"),
        *("-c", f"write -P 2 {tail} 300", "-c", "discard 5M 64k"),
    )
    dirty = [(3 * CLUSTER, CLUSTER), (MIB, 2 * CLUSTER), (5 * MIB, CLUSTER), (10 * MIB, 1000)]
    assert [e[:2] for e in joined(nbd_map(here.uri(), "qemu:dirty-bitmap:b0")) if e[2]] == dirty
    dirty = [(3 * CLUSTER, 4 * KIB), (MIB, 100 * KIB), (5 * MIB, CLUSTER), (10 * MIB, 1000)]
    extents = joined(nbd_map(here.uri(), "qemu:dirty-bitmap:fine grained"))
    assert [e[:2] for e in extents if e[2]] == dirty
    assert {e[2] for e in extents} == {0, 1}
    assert extents[-1][0] + extents[-1][1] == ODD
    assert [e[:2] for e in extents if e[2]] == list(here.disk.bitmaps["fine grained"].ranges())


def test_bitmaps_of_the_command_line(serve, image, run, program):
    program("qemu-io")
    server = serve(image(pattern(ODD)), "--bitmap", "b0", "--bitmap", "Größe")
    run("qemu-io", "-f", "raw", server.uri(), "-c", f"write -P 1 {5 * CLUSTER} 1")
    for name, dirty in (("disk", [(5 * CLUSTER, CLUSTER)]), ("snapshot", [])):  # the snapshot's as at T0
        contexts = export_of(server.uri(name))["contexts"]
        assert sorted(contexts) == ["base:allocation", "qemu:dirty-bitmap:Größe", "qemu:dirty-bitmap:b0"]
        for context in contexts[1:]:
            assert [e[:2] for e in nbd_map(server.uri(name), context) if e[2]] == dirty


def test_frozen_bitmap_of_a_snapshot(host, image, run, program):
    """An incremental backup: the snapshot with the bitmap of what was written before T0, which stays as it was."""
    program("qemu-io")
    here = host(image(pattern(ODD)))
    bitmap = here.disk.bitmaps.add("before")
    here.server.add_export("disk", here.disk, writable=True)
    run("qemu-io", "-f", "raw", here.uri(), "-c", "write -P 1 2M 64k")
    bitmap.disable()
    here.server.add_export("snapshot", here.disk.snapshot(), bitmaps=[bitmap])
    run("qemu-io", "-f", "raw", here.uri(), "-c", "write -P 1 4M 64k")
    extents = joined(nbd_map(here.uri("snapshot"), "qemu:dirty-bitmap:before"))
    assert [e[:2] for e in extents if e[2]] == [(2 * MIB, CLUSTER)]


def test_context_that_does_not_exist(serve, image, run):
    server = serve(image(pattern(EVEN)))
    done = run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:none", server.uri(), status=ERROR)
    assert "does not support metadata context" in done.stderr
