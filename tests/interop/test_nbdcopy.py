"""nbdcopy (libnbd) copies both exports out and a disk in, over many connections, while guests write."""

import os
import time

import pytest
from interop_support import (
    CLUSTER,
    COMMAND,
    LIMIT,
    MIB,
    ODD,
    assert_same,
    mixed,
    nbd_status,
    pattern,
    status_runs,
    uri_of,
)

# connections, requests in flight on each, and more of nbdcopy's options
WAYS = {
    "one-by-one": ("--synchronous", "--request-size=65536"),
    "one-connection": ("--connections=1", "--requests=128"),
    "four-connections": ("--connections=4", "--requests=16", "--threads=2"),
    "sixteen-connections": ("--connections=16", "--requests=64", "--threads=4"),
    "small-requests": ("--connections=2", "--requests=64", "--request-size=4096"),
    "largest-requests": ("--connections=2", "--requests=4", "--request-size=33554432", "--queue-size=134217728"),
    "every-byte-read": ("--connections=4", "--no-extents"),
    "without-sparseness": ("--connections=4", "--sparse=0", "--allocated"),
}


@pytest.fixture(autouse=True)
def _nbdcopy(program):
    program("nbdcopy")


@pytest.mark.parametrize("size", [ODD, 4 * MIB])
def test_copy_out(serve, image, run, place, size):
    content = mixed(size)
    server = serve(image(content))
    for way in WAYS.values():
        for name in ("disk", "snapshot"):
            run("nbdcopy", *way, server.uri(name), place / "out")
            assert_same(place / "out", content)
            (place / "out").unlink()


@pytest.mark.parametrize("way", WAYS)
def test_copy_in(serve, image, run, place, way):
    """The guest overwrites the whole disk, with zeroes where the new content has them; the snapshot is still T0."""
    t0, new = mixed(ODD, seed=1), mixed(ODD, seed=2)
    path = image(t0)
    server = serve(path)
    run("nbdcopy", *WAYS[way], "--flush", image(new, "new.img"), server.uri())
    assert_same(path, new)
    run("nbdcopy", server.uri(), place / "disk")
    assert_same(place / "disk", new)
    run("nbdcopy", *WAYS[way], server.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)
    server.stop()
    assert_same(path, new)


def test_copy_from_server_to_server(serve, image, run, place):
    """Our snapshot into another disk of ours, whose own snapshot does not change."""
    source_content, t0 = mixed(ODD, seed=3), mixed(ODD, seed=4)
    source = serve(image(source_content, "source.img"))
    path = image(t0, "copy.img")
    copy = serve(path)
    run("nbdcopy", "--connections=4", "--flush", source.uri("snapshot"), copy.uri())
    assert_same(path, source_content)
    run("nbdcopy", copy.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def test_copy_onto_holes_makes_holes(serve, image, run):
    """What nbdcopy zeroes takes no space on the disk, and the target gets nothing: at T0 all of it was holes."""
    new = mixed(8 * MIB)
    path = image(bytes(8 * MIB))
    server = serve(path)
    run("nbdcopy", "--flush", image(new, "new.img"), server.uri())
    assert_same(path, new)
    runs = status_runs(new)
    stored = sum(length for _, length, zero in runs if not zero)
    assert sum(length for _, length, zero in nbd_status(server.uri()) if not zero) <= stored + CLUSTER * len(runs)
    assert [run[2] for run in nbd_status(server.uri("snapshot"))] == [True]


def test_read_only_exports_refuse_the_copy(serve, image, run):
    t0 = mixed(ODD)
    path = image(t0)
    server = serve(path)
    done = run("nbdcopy", image(pattern(ODD), "new.img"), server.uri("snapshot"), status=1)
    assert "read-only" in done.stderr
    assert_same(path, t0)


def test_copy_through_pipes(serve, image, run):
    """To stdout and from stdin, where nbdcopy knows no size and cannot seek."""
    t0, new = mixed(ODD, seed=5), mixed(ODD, seed=6)
    path = image(t0)
    server = serve(path)
    assert_same(run("nbdcopy", server.uri("snapshot"), "-", text=False).stdout, t0)
    run("nbdcopy", "--flush", "-", server.uri(), stdin=new, text=False)
    assert_same(path, new)
    assert_same(run("nbdcopy", server.uri("snapshot"), "-", text=False).stdout, t0)


# ---- other places than a unix socket ----


def test_over_tcp(host, image, run, place):
    t0, new = mixed(ODD, seed=11), mixed(ODD, seed=12)
    path = image(t0)
    here = host(path, listen="127.0.0.1:0")
    here.server.add_export("disk", here.disk, writable=True)
    here.server.add_export("snapshot", here.disk.snapshot())
    disk, snapshot = (uri for uri in here.server.uris if uri.startswith("nbd://127.0.0.1:"))
    run("nbdcopy", "--connections=4", "--flush", image(new, "new.img"), disk)
    assert_same(path, new)
    run("nbdcopy", "--connections=4", snapshot, place / "out")
    assert_same(place / "out", t0)


def test_over_tls(serve, image, run, place, certificates):
    """With the certificates of libnbd's own names; without TLS nobody is let in, and no name is told."""
    t0, new = mixed(ODD, seed=13), mixed(ODD, seed=14)
    path = image(t0)
    server = serve(path, "--tls-dir", certificates)
    disk, snapshot = (uri_of(server.socket, name, certificates) for name in ("disk", "snapshot"))
    run("nbdinfo", "--is", "tls", disk)
    run("nbdcopy", "--connections=4", "--flush", image(new, "new.img"), disk)
    assert_same(path, new)
    run("nbdcopy", "--connections=4", snapshot, place / "out")
    assert_same(place / "out", t0)
    assert "requires TLS" in run("nbdcopy", server.uri("snapshot"), place / "none", status=1).stderr
    listing = run("nbdinfo", "--list", server.uri(""), status=1)
    assert "server replied with error to list request" in listing.stderr
    assert "snapshot" not in listing.stdout


def test_tls_that_is_allowed(serve, image, run, place, certificates):
    t0 = mixed(ODD, seed=15)
    server = serve(image(t0), "--tls-dir", certificates, "--tls", "allow")
    for uri in (server.uri("snapshot"), uri_of(server.socket, "snapshot", certificates)):
        run("nbdcopy", uri, place / "out")
        assert_same(place / "out", t0)


def test_started_by_the_client(image, run, place):
    """nbdcopy starts `cbwcore serve` itself, and hands it a listening socket as systemd does."""
    t0, new = mixed(ODD, seed=16), mixed(ODD, seed=17)
    path = image(t0)
    ours = ("[", *COMMAND, path, "]")
    run("nbdcopy", "--connections=4", "--", *ours, place / "out")
    assert_same(place / "out", t0)
    run("nbdcopy", "--connections=4", "--flush", "--", image(new, "new.img"), *ours)
    assert_same(path, new)


# ---- the server ends meanwhile ----


def test_copy_fails_where_the_server_ends(serve, image, background, place):
    """An interrupted copy says so; the server ends at once and without complaint."""
    path = place / "large.img"
    path.touch()
    os.truncate(path, 256 * MIB)
    server = serve(path)
    one_by_one = ("--synchronous", "--no-extents", "--request-size=4096")
    copy = background.start("nbdcopy", *one_by_one, server.uri("snapshot"), place / "out")
    end = time.monotonic() + LIMIT
    while not (place / "out").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    server.stop()
    assert "nbd_pread: " in background.finish(copy, status=1)


# ---- guests that write meanwhile ----


def guest(uri, *options):
    """A guest that reads and writes all of the disk for two seconds, in four parts, and verifies what it wrote."""
    return [
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", "--thread"),
        *("--rw=randrw", "--rwmixread=20", "--bsrange=512-128k", "--blockalign=512", "--iodepth=16"),
        *(
            "--numjobs=4",
            "--size=25%",
            "--offset_increment=25%",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--randseed=7",
        ),
        *("--rate_iops=300", "--runtime=2", "--time_based", "--group_reporting", *options),
    ]


@pytest.mark.parametrize("way", ["one-by-one", "four-connections", "every-byte-read"])
def test_guests_write_while_the_snapshot_is_copied(serve, image, run, program, background, place, way):
    """The central case: however often it is pulled, before, during and after the guest, the snapshot is T0."""
    program("fio")
    t0 = mixed(32 * MIB, seed=7)
    path = image(t0)
    server = serve(path)
    fio = background.start(*guest(server.uri()))
    pulls = 0
    while fio.poll() is None or pulls < 2:
        run("nbdcopy", *WAYS[way], server.uri("snapshot"), place / "pulled")
        assert_same(place / "pulled", t0)
        pulls += 1
    background.finish(fio)
    run("nbdcopy", server.uri("snapshot"), place / "pulled")
    assert_same(place / "pulled", t0)
    assert path_differs(path, t0), "the guest wrote nothing"


def path_differs(path, content):
    with open(path, "rb") as f:
        return f.read() != content


def test_disk_is_overwritten_while_the_snapshot_is_copied(serve, image, run, background, place):
    """nbdcopy against nbdcopy: every cluster is overwritten once while all of them are read."""
    t0, new = pattern(32 * MIB, seed=8), pattern(32 * MIB, seed=9)
    path = image(t0)
    server = serve(path)
    for _ in range(3):
        writer = background.start("nbdcopy", "--connections=4", "--flush", image(new, "new.img"), server.uri())
        run("nbdcopy", "--connections=4", "--request-size=131072", server.uri("snapshot"), place / "pulled")
        assert_same(place / "pulled", t0)
        background.finish(writer)
        assert_same(path, new)
    run("nbdcopy", server.uri("snapshot"), place / "pulled")
    assert_same(place / "pulled", t0)


def test_several_snapshots_each_at_its_own_t0(host, image, run, background, place):
    """Snapshots of different moments are pulled at once, while the disk is overwritten again."""
    states = [pattern(8 * MIB + 512, seed=10 + i) for i in range(4)]
    path = image(states[0])
    here = host(path)
    here.server.add_export("disk", here.disk, writable=True)
    for i, state in enumerate(states[1:]):
        here.server.add_export(f"snapshot {i}", here.disk.snapshot())
        writer = background.start("nbdcopy", "--flush", image(state, f"new{i}.img"), here.uri())
        pulls = [
            background.start("nbdcopy", "--connections=2", here.uri(f"snapshot {j}"), place / f"pulled{j}")
            for j in range(i + 1)
        ]
        for process in (writer, *pulls):
            background.finish(process)
        for j in range(i + 1):
            assert_same(place / f"pulled{j}", states[j])
        assert_same(path, state)
