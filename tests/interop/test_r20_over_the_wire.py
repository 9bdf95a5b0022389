"""R20 seen by the programs that make backups.

A snapshot never calls zero what was not zero at T0: after `write -z -u 4k 60k` QEMU 7.2's own daemon does, and nbdcopy
and qemu-img convert then write zeroes for data and exit 0. The other sequences are of the same kind.
"""

import pytest
from interop_support import (
    CLUSTER,
    MIB,
    ODD,
    assert_same,
    assert_status,
    mixed,
    nbd_status,
    need_libnbd_python,
    pattern,
)

SIZE = 3 * MIB + 1000
T0 = pattern(MIB + 512 * 1024) + mixed(SIZE - MIB - 512 * 1024)  # data, then data with holes

SEQUENCES = {
    "peer-fails-here": ["write -z -u 4k 60k"],
    "one-cluster": ["write -z -u 64k 64k"],
    "discard-in-a-cluster": ["discard 4k 60k"],
    "discard-clusters": ["discard 64k 1M"],
    "parts-of-many": ["write -z -u 4k 60k", "write -z -u 72k 40k", "discard 200k 8k", "write -z 300k 4k"],
    "across-clusters": ["write -z -u 60k 8k", "discard 124k 8k"],
    "the-whole-disk": [f"write -z -u 0 {SIZE}"],
    "the-whole-disk-discarded": [f"discard 0 {SIZE}"],
    "the-tail": [f"write -z -u {SIZE - 900} 900", f"discard {SIZE - CLUSTER} {CLUSTER}"],
    "written-then-zeroed": ["write -P 1 0 1M", "write -z -u 0 1M"],
    "zeroed-then-written": ["write -z -u 0 1M", "write -P 1 4k 60k", "discard 0 64k"],
    "zeroed-bit-by-bit": [f"write -z -u {i * 4096} 4096" for i in range(64)],
    "written-zeroes": ["write -P 0 0 2M", "write -P 0 4097 100"],
    "holes-filled": ["write -P 1 2M 1M", "write -P 1 1900k 100"],
}

PULLS = {
    "nbdcopy": ("nbdcopy",),
    "nbdcopy-one-by-one": ("nbdcopy", "--synchronous", "--request-size=4096"),
    "qemu-img": ("qemu-img", "convert", "-f", "raw", "-O", "raw"),
}


@pytest.fixture(autouse=True)
def _programs(program):
    program("nbdcopy", "nbdinfo", "qemu-io", "qemu-img")


def assert_pulls(run, uri, place, t0):
    """Every program gets T0 out of it (qemu-img counts in sectors), and its map agrees with T0."""
    for pull, command in PULLS.items():
        out = place / "pulled"
        run(*command, uri, out)
        assert_same(out, t0 + bytes(-len(t0) % 512) if pull == "qemu-img" else t0)
        out.unlink()
    assert_status(nbd_status(uri), t0)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_backup_of_the_snapshot(serve, image, run, place, sequence):
    server = serve(image(T0))
    commands = [part for command in SEQUENCES[sequence] for part in ("-c", command)]
    assert "failed" not in run("qemu-io", "-f", "raw", "--discard=unmap", server.uri(), *commands).stdout
    assert_pulls(run, server.uri("snapshot"), place, T0)


def test_after_each_request(serve, image, run, place):
    """With small clusters, and the snapshot is pulled between the requests, too."""
    server = serve(image(T0), "--cluster-size", "4096")
    for command in ("write -z -u 4k 60k", "discard 100k 300k", "write -P 0 1M 64k", f"discard 0 {SIZE}", "write 0 2M"):
        run("qemu-io", "-f", "raw", "--discard=unmap", server.uri(), "-c", command)
        assert_pulls(run, server.uri("snapshot"), place, T0)


def test_zeroes_while_the_snapshot_is_pulled(serve, image, run, background, place):
    """The guest unmaps the disk cluster by cluster while programs read: none mistakes a new hole."""
    t0 = pattern(32 * MIB)
    path = image(t0)
    server = serve(path)
    commands = []
    for offset in range(0, len(t0), CLUSTER):
        kind = "discard" if offset // CLUSTER % 2 else "write -z -u"
        commands += ["-c", f"{kind} {offset + 4096} 60k"]
    guest = background.start("qemu-io", "-f", "raw", "--discard=unmap", server.uri(), *commands)
    pulls = 0
    while guest.poll() is None or pulls < 2:
        run("nbdcopy", "--connections=2", "--request-size=65536", server.uri("snapshot"), place / "pulled")
        assert_same(place / "pulled", t0)
        assert_status(nbd_status(server.uri("snapshot")), t0)
        pulls += 1
    assert "failed" not in background.finish(guest)
    with open(path, "rb") as f:
        assert f.read(CLUSTER) == t0[:4096] + bytes(60 * 1024)


def test_outside_the_scope_is_no_hole(host, image, run, place):
    """Clusters that the snapshot does not cover cannot be read; a backup fails there, and writes no zeroes for them."""
    t0 = mixed(ODD)
    here = host(image(t0))
    scope = here.disk.bitmaps.add("scope", enabled=False)
    scope.set_range(2 * MIB, 3 * MIB)
    here.server.add_export("disk", here.disk, writable=True)
    here.server.add_export("snapshot", here.disk.snapshot(bitmap="scope"))
    run("qemu-io", "-f", "raw", here.uri(), "-c", f"write -z -u 0 {ODD}")
    for command in PULLS.values():
        assert "Input/output error" in run(*command, here.uri("snapshot"), place / "out", status=1).stderr
    status = nbd_status(here.uri("snapshot"))
    for offset, length, zero in status:
        if zero:
            assert offset >= 2 * MIB
            assert offset + length <= 5 * MIB
            assert not any(t0[offset : offset + length])
    read = ("qemu-io", "-r", "-f", "raw", here.uri("snapshot"), "-c")
    assert "read 65536/65536" in run(*read, "read 2M 64k").stdout
    assert "Input/output error" in "".join(run(*read, "read 0 64k", status=1).stdout)


def test_discarded_parts_are_no_holes(host, image, run):
    """A backup that has reclaimed what it copied gets errors there afterwards, never zeroes."""
    t0 = pattern(ODD)
    here = host(image(t0))
    here.server.add_export("disk", here.disk, writable=True)
    here.server.add_export("snapshot", here.disk.snapshot(), discard=True)
    script = f"h.set_strict_mode(0); h.connect_uri({here.uri('snapshot')!r}); h.trim({MIB}, {MIB})"
    run(need_libnbd_python(), "-m", "nbd", "-c", script)
    status = nbd_status(here.uri("snapshot"))
    assert not any(zero for _, _, zero in status)
    read = ("qemu-io", "-r", "-f", "raw", here.uri("snapshot"), "-c")
    assert "Input/output error" in run(*read, "read 1M 64k", status=1).stdout
    assert "read 65536/65536" in run(*read, "read 0 64k").stdout
    assert "read 65536/65536" in run(*read, "read 2M 64k").stdout
