"""qemu-io as the guest: every kind of request at odd places, against a model of the disk; the snapshot stays T0."""

import pytest
from interop_support import CLUSTER, KIB, MIB, ODD, assert_same, mixed, pattern


@pytest.fixture(autouse=True)
def _qemu_io(program):
    program("qemu-io")


class Guest:
    """A list of qemu-io commands, and what the disk must hold after them."""

    def __init__(self, t0):
        self.size = len(t0)
        self.now = bytearray(t0)
        self.discarded = bytearray(t0)  # as `now`, with zeroes where the guest discarded: both are allowed there
        self.commands = []

    def do(self, command):
        self.commands += ["-c", command]

    def wrote(self, offset, data):
        self.now[offset : offset + len(data)] = data
        self.discarded[offset : offset + len(data)] = data

    def write(self, value, offset, length, options="", command="write"):
        self.do(f"{command} {options} -P {value} {offset} {length}")
        self.wrote(offset, bytes([value]) * length)

    def writev(self, value, offset, *lengths):
        self.do(f"writev -P {value} {offset} {' '.join(map(str, lengths))}")
        self.wrote(offset, bytes([value]) * sum(lengths))

    def zero(self, offset, length, options="", command="write"):
        self.do(f"{command} -z {options} {offset} {length}")
        self.wrote(offset, bytes(length))

    def discard(self, offset, length):
        self.do(f"discard {offset} {length}")
        self.discarded[offset : offset + length] = bytes(length)

    def read(self, value, offset, length):
        self.do(f"read -P {value} {offset} {length}")

    def run(self, run, uri, *options):
        """All commands in one qemu-io, which must not say that one failed; what it printed."""
        output = run("qemu-io", "-f", "raw", *options, uri, *self.commands).stdout
        assert "failed" not in output
        self.commands = []
        return output

    def assert_disk(self, got):
        """What was written is there; what was discarded is as before, or zero."""
        if self.now == self.discarded:
            assert_same(got, bytes(self.now))
            return
        assert len(got) == self.size
        for offset in range(0, self.size, 512):
            end = offset + 512
            assert got[offset:end] in (self.now[offset:end], self.discarded[offset:end]), f"at {offset:#x}"


@pytest.fixture
def guest_of(serve, image, run, place, program):
    """``guest_of(t0, *options)``: (server, Guest, check); ``check()`` compares disk and snapshot with them."""
    program("nbdcopy")

    def guest_of(t0, *options):
        path = image(t0)
        server = serve(path, *options)
        guest = Guest(t0)

        def check():
            for name in ("disk", "snapshot"):
                run("nbdcopy", "--no-extents", server.uri(name), place / name)
            guest.assert_disk((place / "disk").read_bytes())
            assert_same(place / "snapshot", t0)
            with open(path, "rb") as f:
                assert_same(place / "disk", f.read())

        return server, guest, check

    return guest_of


def test_partial_and_adjacent(guest_of, run):
    """Parts of sectors, of pages and of clusters; neighbours that meet in a byte; the same bytes twice."""
    server, guest, check = guest_of(mixed(ODD))
    guest.write(1, 0, 1)
    guest.write(2, 1, 511)
    guest.write(3, 512, 3 * KIB)
    guest.write(4, CLUSTER - 1, 2)
    guest.write(5, CLUSTER + 1, CLUSTER - 2)
    guest.write(6, 2 * CLUSTER - 1, 1)
    guest.write(7, 2 * CLUSTER, CLUSTER)
    guest.write(8, 5 * CLUSTER - 10, 3 * CLUSTER + 20)
    guest.write(9, 6 * CLUSTER, 100)
    guest.write(10, 6 * CLUSTER + 50, 100)
    guest.writev(11, 3 * MIB + 123, 1, 4096, 65536, 7, 100_000)
    guest.write(12, 4 * MIB, 3 * MIB)
    for i in range(64):
        guest.write(100 + i, 8 * MIB + i * 4097, 4097)
    guest.read(1, 0, 1)
    guest.read(2, 1, 511)
    guest.read(10, 6 * CLUSTER + 50, 100)
    guest.run(run, server.uri())
    check()


def test_the_tail_of_an_odd_disk(guest_of, run):
    server, guest, check = guest_of(mixed(ODD))
    guest.write(1, ODD - 1, 1)
    guest.write(2, ODD - 300, 299)
    guest.read(1, ODD - 1, 1)
    guest.run(run, server.uri())
    check()
    guest.write(3, ODD - 1000 - 10, 1010)  # across the last whole cluster's end
    guest.zero(ODD - 500, 400)
    guest.run(run, server.uri())
    check()
    guest.zero(ODD - 200, 200, "-u")
    guest.write(4, ODD - 2 * CLUSTER, 2 * CLUSTER, "-f")
    guest.discard(ODD - 1000, 1000)
    guest.run(run, server.uri())
    check()


@pytest.mark.parametrize("size", [1, 511, 4096, CLUSTER - 1])
def test_disks_smaller_than_a_cluster(guest_of, run, size):
    server, guest, check = guest_of(pattern(size))
    guest.write(1, size - 1, 1)
    guest.run(run, server.uri())
    check()
    guest.zero(0, size)
    guest.run(run, server.uri())
    check()


@pytest.mark.parametrize("options", ["", "-u", "-u -f"])
def test_zeroes(guest_of, run, options):
    """write -z: with -u it may unmap, with -f it is durable."""
    server, guest, check = guest_of(pattern(ODD))
    guest.zero(4 * KIB, 60 * KIB, options)
    guest.zero(100_001, 1, options)
    guest.zero(MIB + 17, MIB, options)
    guest.zero(3 * MIB, 4 * MIB, options)
    guest.read(0, 3 * MIB, 4 * MIB)
    guest.write(9, 5 * MIB, 12345)
    guest.zero(9 * MIB + 1, ODD - 9 * MIB - 1, options)
    guest.run(run, server.uri())
    check()


def test_fast_zeroes(guest_of, run):
    """write -z -n is done or refused, and changes nothing where it is refused."""
    server, guest, check = guest_of(pattern(ODD))
    ranges = [(MIB, MIB), (3 * MIB, 5 * KIB), (5 * MIB + 1, 100)]
    commands = [part for offset, length in ranges for part in ("-c", f"write -z -n {offset} {length}")]
    done = run("qemu-io", "-f", "raw", server.uri(), *commands, status=None)
    for offset, length in ranges:
        if f"wrote {length}/{length} bytes at offset {offset}" in done.stdout:
            guest.wrote(offset, bytes(length))
    assert (done.stdout + done.stderr).count("Operation not supported") == len(ranges) - done.stdout.count("wrote ")
    check()


def test_discard(guest_of, run):
    server, guest, check = guest_of(pattern(ODD))
    guest.discard(4 * KIB, 60 * KIB)
    guest.discard(MIB, MIB)
    guest.discard(3 * MIB + 1000, 100_000)
    guest.run(run, server.uri(), "--discard=unmap")
    check()
    guest.write(3, MIB + 4 * KIB, 8 * KIB)
    guest.read(3, MIB + 4 * KIB, 8 * KIB)
    guest.run(run, server.uri(), "--discard=unmap")
    check()


def test_fua_and_flush(guest_of, run):
    server, guest, check = guest_of(mixed(ODD))
    for i in range(20):
        guest.write(i + 1, i * 400_003, 1000 + i, "-f")
        guest.zero(i * 400_003 + 5000, 100, "-f")
    guest.do("flush")
    guest.run(run, server.uri(), "-t", "writeback")
    check()
    for i in range(20):
        guest.write(i + 50, i * 400_003 + 3, 1000)
    guest.run(run, server.uri(), "-t", "writethrough")  # a FUA with each
    check()


def test_aio(guest_of, run):
    """Hundreds of requests in flight at once, in ranges that do not meet, reads of old data among them."""
    server, guest, check = guest_of(pattern(ODD))
    for batch in range(3):
        for i in range(150):
            offset = i * 69_905
            if i % 3 == batch:
                guest.write(i + 1, offset + 111, 66_000, command="aio_write")
            elif i % 7 == 0:
                guest.zero(offset, 30_000, command="aio_write")
            else:
                guest.do(f"aio_read {offset} 69905")
        guest.do("aio_flush")
    guest.do("flush")
    guest.run(run, server.uri())
    check()


def test_random_requests(guest_of, run, rng):
    """A seeded guest; its reads are verified by qemu-io itself."""
    t0 = mixed(2 * MIB + 777)
    server, guest, check = guest_of(t0, "--cluster-size", "4096")
    size = len(t0)
    for _ in range(400):
        length = min(size, rng.choice([1, 17, 512, 4096, 5000, 65536, 200_000]))
        offset = rng.randrange(size - length + 1)
        value = rng.randrange(1, 255)
        kind = rng.randrange(6)
        if kind == 0:
            guest.zero(offset, length, rng.choice(["", "-u", "-f"]))
            guest.read(0, offset, length)
        elif kind == 1:
            guest.discard(offset, length)
        else:
            guest.write(value, offset, length, rng.choice(["", "-f"]))
            guest.read(value, offset, length)
    guest.run(run, server.uri(), "--discard=unmap")
    check()


def test_large_requests(guest_of, run):
    """One request of all the disk, which QEMU cuts at the server's 32 MiB."""
    server, guest, check = guest_of(pattern(40 * MIB + 512))
    guest.write(1, 0, 40 * MIB + 512)
    guest.read(1, 0, 40 * MIB + 512)
    guest.run(run, server.uri())
    check()
    guest.zero(0, 40 * MIB + 512, "-u")
    guest.read(0, 0, 40 * MIB + 512)
    guest.run(run, server.uri())
    check()


def test_two_guests_on_one_disk(serve, image, run, background, place):
    """Each writes every second cluster, with requests that reach into no other's; both see what the other wrote."""
    t0 = pattern(8 * MIB)
    path = image(t0)
    server = serve(path)
    clusters = range(0, 8 * MIB, CLUSTER)
    guests = []
    for first in (0, 1):
        commands = [("-c", f"aio_write -P {first + 1} {offset} 64k") for offset in clusters[first::2]]
        flat = [part for command in commands for part in command]
        guests.append(background.start("qemu-io", "-f", "raw", server.uri(), *flat, "-c", "aio_flush", "-c", "flush"))
    for guest in guests:
        assert "failed" not in background.finish(guest)
    expected = (b"\x01" * CLUSTER + b"\x02" * CLUSTER) * (len(clusters) // 2)
    run("nbdcopy", server.uri(), place / "disk")
    assert_same(place / "disk", expected)
    assert_same(path, expected)
    run("nbdcopy", server.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)


# ---- refusals ----


def test_writes_to_the_snapshot_are_refused(serve, image, run, place):
    t0 = pattern(ODD)
    server = serve(image(t0))
    done = run("qemu-io", "-f", "raw", server.uri("snapshot"), "-c", "write 0 4k", status=1)
    assert "Permission denied" in done.stderr
    read = run("qemu-io", "-r", "-f", "raw", server.uri("snapshot"), "-c", "write 0 4k", "-c", "read 0 4k", status=None)
    assert "write failed" in read.stdout + read.stderr or "read-only" in read.stdout + read.stderr
    run("nbdcopy", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def test_read_only_disk(serve, image, run):
    path = image(b"\x07" * MIB)
    server = serve(path, "--read-only", "--no-snapshot", target=None)
    assert "Permission denied" in run("qemu-io", "-f", "raw", server.uri(), "-c", "write 0 4k", status=1).stderr
    assert "failed" not in run("qemu-io", "-r", "-f", "raw", server.uri(), "-c", "read -P 7 0 1M").stdout
    assert_same(path, b"\x07" * MIB)


def test_full_target_is_an_io_error_for_the_guest(host, image, run, place):
    """break-guest-write: EIO, never ENOSPC, for which a hypervisor pauses the guest; disk and snapshot stay right."""
    t0 = pattern(ODD)
    path = image(t0)
    here = host(path)
    here.server.add_export("disk", here.disk, writable=True)
    here.server.add_export("snapshot", here.disk.snapshot(place / "target", target_limit=2 * CLUSTER))
    writes = [part for i in range(4) for part in ("-c", f"write -P 9 {i * CLUSTER} 4k")]
    done = run("qemu-io", "-f", "raw", here.uri(), *writes, status=1)
    assert (done.stdout + done.stderr).count("write failed: Input/output error") == 2
    assert "No space" not in done.stdout + done.stderr
    expected = bytearray(t0)
    expected[: 4 * KIB] = expected[CLUSTER : CLUSTER + 4 * KIB] = b"\x09" * (4 * KIB)
    run("nbdcopy", here.uri(), place / "disk")
    assert_same(place / "disk", bytes(expected))
    run("nbdcopy", here.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)


def test_broken_snapshot_is_an_io_error_for_the_backup(host, image, run, place):
    """break-snapshot: the guest goes on, and no program copies a single byte of the snapshot any more."""
    path = image(pattern(ODD))
    here = host(path)
    here.server.add_export("disk", here.disk, writable=True)
    snapshot = here.disk.snapshot(place / "target", target_limit=CLUSTER, on_cbw_error="break-snapshot")
    here.server.add_export("snapshot", snapshot)
    writes = [part for i in range(4) for part in ("-c", f"write -P 9 {i * CLUSTER} 64k")]
    assert "failed" not in run("qemu-io", "-f", "raw", here.uri(), *writes, "-c", "read -P 9 0 256k").stdout
    assert snapshot.state == "broken"
    for offset in (0, 5 * CLUSTER, ODD - 1):
        done = run("qemu-io", "-r", "-f", "raw", here.uri("snapshot"), "-c", f"read {offset} 1", status=1)
        assert "Input/output error" in done.stdout + done.stderr
    for command in (("nbdcopy",), ("nbdcopy", "--no-extents"), ("qemu-img", "convert", "-O", "raw")):
        assert "Input/output error" in run(*command, here.uri("snapshot"), place / "out", status=1).stderr
