"""qemu-img converts, compares, maps and measures both exports, and converts into the disk."""

import json

import pytest
from interop_support import CLUSTER, KIB, MIB, ODD, assert_same, assert_status, joined, mixed, pattern
from programs_support import run_json

SECTOR = 512


@pytest.fixture(autouse=True)
def _qemu_img(program):
    program("qemu-img", "qemu-io")


def padded(content):
    """A disk as QEMU sees it, which counts in sectors: with zeroes after an odd end."""
    return content + bytes(-len(content) % SECTOR)


def qemu_map(*options):
    """(start, length, zero) as qemu-img map tells them; what is data is not zero."""
    extents = run_json("qemu-img", "map", "--output=json", *options)
    assert all(e["data"] is not e["zero"] for e in extents)
    return [(e["start"], e["length"], e["zero"]) for e in extents]


WAYS = {
    "in-order": ("-m", "1"),
    "eight-out-of-order": ("-m", "8", "-W"),
    "no-zero-detection": ("-S", "0"),
    "every-write-durable": ("-t", "writethrough"),
}


@pytest.mark.parametrize("size", [ODD, 4 * MIB])
def test_convert_out(serve, image, run, place, size):
    content = mixed(size)
    server = serve(image(content))
    for way in WAYS.values():
        for name in ("disk", "snapshot"):
            run("qemu-img", "convert", *way, "-f", "raw", "-O", "raw", server.uri(name), place / "out")
            assert_same(place / "out", padded(content))


@pytest.mark.parametrize("way", WAYS)
def test_convert_in(serve, image, run, place, way):
    size = 8 * MIB + SECTOR
    t0, new = mixed(size, seed=1), mixed(size, seed=2)
    path = image(t0)
    server = serve(path)
    run("qemu-img", "convert", *WAYS[way], "-n", "-f", "raw", "-O", "raw", image(new, "new.img"), server.uri())
    assert_same(path, new)
    run("qemu-img", "convert", *WAYS[way], "-f", "raw", "-O", "raw", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)
    server.stop()
    assert_same(path, new)


def test_convert_to_qcow2_and_compare(serve, image, run, place):
    """A backup in QEMU's own format is the snapshot, and compare sees it: also when the guest has written."""
    t0 = mixed(ODD)
    path = image(t0)
    server = serve(path)
    backup = place / "backup.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", "-c", server.uri("snapshot"), backup)
    compare = ("qemu-img", "compare", "-f", "qcow2", "-F", "raw", backup)
    assert run(*compare, server.uri("disk")).stdout == "Images are identical.\n"
    run("qemu-io", "-f", "raw", server.uri(), "-c", f"write -P 7 {5 * MIB + 12345} 1")
    assert run(*compare, server.uri("snapshot")).stdout == "Images are identical.\n"
    sector = (5 * MIB + 12345) // SECTOR * SECTOR
    assert f"mismatch at offset {sector}" in run(*compare, server.uri("disk"), status=1).stdout
    run("qemu-img", "convert", "-O", "raw", backup, place / "restored")
    assert_same(place / "restored", padded(t0))


def test_strict_compare_sees_the_same_holes(serve, image, run):
    """`compare -s` also compares what is allocated: the snapshot's with the file's."""
    content = mixed(8 * MIB)
    server = serve(image(content))
    same = image(content, "same.img")
    done = run("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", server.uri("snapshot"), same)
    assert done.stdout == "Images are identical.\n"


def test_restore_from_qcow2(serve, image, run, place):
    new = mixed(8 * MIB, seed=3)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image(new, "new.img"), place / "new.qcow2")
    t0 = pattern(8 * MIB, seed=4)
    path = image(t0)
    server = serve(path)
    run("qemu-img", "convert", "-n", "-m", "8", "-W", "-O", "raw", place / "new.qcow2", server.uri())
    assert_same(path, new)
    run("qemu-img", "convert", "-O", "raw", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def test_convert_into_the_snapshot_is_refused(serve, image, run, place):
    t0 = mixed(8 * MIB)
    path = image(t0)
    server = serve(path)
    new = image(pattern(8 * MIB), "new.img")
    done = run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", new, server.uri("snapshot"), status=1)
    assert "Permission denied" in done.stderr
    run("qemu-img", "convert", "-O", "raw", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def test_list(host, image, run, program):
    """QEMU's own look at a server: every export with its size, flags and contexts."""
    program("qemu-nbd")
    here = host(image(pattern(ODD)))
    here.disk.bitmaps.add("b0")
    here.server.add_export("disk", here.disk, writable=True, bitmaps=["b0"], description="what the guest sees")
    here.server.add_export("snapshot", here.disk.snapshot(), description="what it was")
    text = run("qemu-nbd", "--list", "-k", here.socket).stdout
    assert text.startswith("exports available: 2\n")
    disk, snapshot = (dict(fields(part)) for part in text.split(" export: ")[1:])
    assert (disk[""], snapshot[""]) == ("'disk'", "'snapshot'")
    assert (disk["description"], snapshot["description"]) == ("what the guest sees", "what it was")
    for export in (disk, snapshot):
        assert export["size"] == str(ODD)
        assert (export["min block"], export["max block"]) == ("1", str(32 * MIB))
    of_disk, of_snapshot = (export["flags"].split()[2:-1] for export in (disk, snapshot))  # 0x583 ( readonly df ... )
    assert set(of_disk) == {"flush", "fua", "trim", "zeroes", "df", "multi", "cache", "fast-zero"}
    assert set(of_snapshot) == {"readonly", "df", "multi", "cache"}
    assert disk["available meta contexts"] == "2"
    assert snapshot["available meta contexts"] == "1"


def fields(part):
    """What qemu-nbd tells of one export, as (name, value); the export's own name comes first."""
    first, *lines = part.splitlines()
    yield "", first
    for line in lines:
        name, _, value = line.strip().partition(":")
        yield name, value.strip()


def test_info(serve, image, run):
    server = serve(image(pattern(8 * MIB)))
    for name in ("disk", "snapshot", ""):
        facts = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", server.uri(name)).stdout)
        assert facts["virtual-size"] == 8 * MIB


@pytest.mark.parametrize("size", [ODD, 8 * MIB])
def test_map(serve, image, size):
    content = mixed(size)
    server = serve(image(content))
    for name in ("disk", "snapshot"):
        zero = assert_status(qemu_map("-f", "raw", server.uri(name)), padded(content))
        assert zero > size // 4


def test_map_after_guest_writes(serve, image, run):
    t0 = mixed(8 * MIB)
    path = image(t0)
    server = serve(path)
    run(
        *("qemu-io", "-f", "raw", server.uri(), "-c", "write -z -u 1M 1M", "-c", "write -P 0x5a 3M 1M"),
        *("-c", "discard 5M 128k", "-c", "write -z 6M 4k", "-c", "write -z -u 4k 60k"),
    )
    assert_status(qemu_map("-f", "raw", server.uri("snapshot")), t0)
    with open(path, "rb") as f:
        assert_status(qemu_map("-f", "raw", server.uri()), f.read())


def test_map_of_a_dirty_bitmap(host, image, run):
    """QEMU's own reader of qemu:dirty-bitmap: what is dirty it calls no data."""
    here = host(image(pattern(8 * MIB)))
    here.disk.bitmaps.add("b0")
    here.server.add_export("disk", here.disk, writable=True, bitmaps=["b0"])
    run(
        "qemu-io", "-f", "raw", here.uri(), "-c", "write -P 1 130k 1k", "-c", "write -z 1M 100k", "-c", "discard 5M 64k"
    )
    options = f"driver=nbd,server.type=unix,server.path={here.socket},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:b0"
    extents = run_json("qemu-img", "map", "--output=json", "--image-opts", options)
    dirty = [(e["start"], e["length"]) for e in extents if not e["data"]]
    assert dirty == [(2 * CLUSTER, CLUSTER), (MIB, 2 * CLUSTER), (5 * MIB, CLUSTER)]
    assert len(joined([(e["start"], e["length"], e["data"]) for e in extents])) == 7


def test_bench(serve, image, run, place):
    """Reads, and writes with flushes between, of several depths; then the disk holds the pattern, the snapshot T0."""
    t0 = mixed(16 * MIB)
    path = image(t0)
    server = serve(path)
    for depth, size, step in [(1, 4 * KIB, 4 * KIB), (64, 4 * KIB, 64 * KIB), (32, 64 * KIB, 64 * KIB)]:
        count = 16 * MIB // step
        bench = ("qemu-img", "bench", "-f", "raw", "-c", count, "-d", depth, "-s", size, "-S", step)
        run(*bench, server.uri("snapshot"))
        run(*bench, "-w", "--pattern=90", f"--flush-interval={count // 4 or 1}", "--no-drain", server.uri())
    assert_same(path, bytes([90]) * (16 * MIB))
    run("qemu-img", "convert", "-O", "raw", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def test_guests_write_while_the_snapshot_is_converted(serve, image, run, background, place):
    t0 = mixed(32 * MIB, seed=5)
    path = image(t0)
    server = serve(path)
    bench = ("qemu-img", "bench", "-f", "raw", "-w", "--pattern=90", "-c", 8192, "-d", 4, "-s", "4k", "-S", "4k")
    guest = background.start(*bench, server.uri())
    pulls = 0
    while guest.poll() is None or pulls < 2:
        run("qemu-img", "convert", "-m", "8", "-W", "-O", "raw", server.uri("snapshot"), place / "pulled")
        assert_same(place / "pulled", t0)
        pulls += 1
    background.finish(guest)
    assert_same(path, bytes([90]) * (32 * MIB))


def test_commit_into_the_disk(serve, image, run, place):
    """An overlay made on the snapshot is the guest's sandbox: writes go to it, the snapshot stays as it is."""
    t0 = mixed(8 * MIB)
    server = serve(image(t0))
    overlay = place / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", server.uri("snapshot"), overlay)
    run("qemu-io", "-f", "qcow2", overlay, "-c", "write -P 3 1M 64k", "-c", "read -P 3 1M 64k")
    run("qemu-img", "convert", "-O", "raw", overlay, place / "merged")
    expected = t0[:MIB] + b"\x03" * CLUSTER + t0[MIB + CLUSTER :]
    assert_same(place / "merged", expected)
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", server.uri("disk"), overlay)
    run("qemu-img", "commit", "-q", overlay)
    run("qemu-img", "convert", "-O", "raw", server.uri("disk"), place / "disk")
    assert_same(place / "disk", expected)
    run("qemu-img", "convert", "-O", "raw", server.uri("snapshot"), place / "snapshot")
    assert_same(place / "snapshot", t0)


def test_over_tls(serve, image, run, place, certificates):
    """QEMU's own TLS and its names of certificates; without TLS it is not let in."""
    t0, new = mixed(8 * MIB, seed=6), mixed(8 * MIB, seed=7)
    path = image(t0)
    server = serve(path, "--tls-dir", certificates)
    credentials = ("--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=client")

    def options(name, tls="tls-creds=tls,tls-hostname=localhost"):
        return f"driver=nbd,server.type=unix,server.path={server.socket},export={name},{tls}"

    into = ("qemu-img", "convert", *credentials, "-n", "-m", "8", "-W", "-f", "raw", "--target-image-opts")
    run(*into, image(new, "new.img"), f"driver=raw,file.{options('disk').replace(',', ',file.')}")
    assert_same(path, new)
    out = ("qemu-img", "convert", *credentials, "-O", "raw", "--image-opts")
    run(*out, options("snapshot"), place / "out")
    assert_same(place / "out", t0)
    assert "TLS" in run(*out, options("snapshot", "reconnect-delay=0"), place / "none", status=1).stderr
