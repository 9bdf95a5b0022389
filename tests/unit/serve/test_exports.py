"""`cbwcore serve`: whom it serves what."""

import contextlib
import os
import signal
import subprocess

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, pattern
from nbd_support import Client, Disconnected
from programs_support import need
from serve_support import SIZE, WRITTEN, connected, one_line

import cbwcore


def test_no_snapshot(serve, image, path, left):
    serving = serve(image, "--socket", path, "--no-snapshot").ready()
    assert len(serving.lines) == 2
    with Client(path) as client:
        assert client.hello().option(nbd.LIST).names == ["disk"]
        assert client.go("snapshot").error == nbd.ERR_UNKNOWN
    assert serving.end() == (0, "", "")


def test_read_only(serve, image, path):
    serving = serve(image, "--socket", path, "--read-only").ready()
    with connected(path) as client:
        assert client.flags & nbd.READ_ONLY
        assert client.call(nbd.WRITE, 0, 0, WRITTEN).error == nbd.EPERM
    with cbwcore.Disk(image, read_only=True) as other:
        assert other.size == SIZE
    assert serving.end() == (0, "", "")
    assert image.read_bytes() == pattern(SIZE)


def test_name_and_target(serve, image, path, place, left):
    target = place / "fleece"
    serving = serve(image, "--socket", path, "--name", "T0", "--target", target, "--cluster-size", "4k").ready()
    with connected(path) as guest, connected(path, "T0") as reader:
        guest.ok(nbd.WRITE, 8192, 0, WRITTEN)
        assert reader.read(8000, 1000) == pattern(SIZE)[8000:9000]
    assert serving.end() == (0, "", "")
    assert left() == ["fleece"]
    assert target.stat().st_size == SIZE
    fleece = target.read_bytes()
    assert fleece[8192:12288] == pattern(SIZE)[8192:12288]
    assert not any(fleece[:8192])
    assert not any(fleece[12288:])


def dirty(client, size=SIZE):
    """The extents of the one bitmap that the client has chosen, (length, flags)."""
    (extents,) = client.ok(nbd.BLOCK_STATUS, 0, size).status.values()
    return extents


@contextlib.contextmanager
def choosing(where, export, bitmap):
    """A client that has chosen a bitmap's context."""
    with Client(where) as client:
        client.hello().option(nbd.STRUCTURED_REPLY)
        reply = client.meta(nbd.SET_META_CONTEXT, export, f"qemu:dirty-bitmap:{bitmap}")
        assert set(reply.names) == {f"qemu:dirty-bitmap:{bitmap}"}
        assert client.go(export).error == 0
        yield client


def test_bitmaps_of_the_disk_as_they_are_and_of_the_snapshot_as_at_t0(serve, image, path):
    """And they are there again the next time, with all that was written in between; others of the disk record, too."""
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("unasked", persistent=True)
    before = []
    for unit in (1, 3):
        serving = serve(image, "--socket", path, "--bitmap", "a", "--bitmap", "b").ready()
        with connected(path) as guest:
            guest.ok(nbd.WRITE, unit * CLUSTER, 0, WRITTEN)
        for export, units in (("disk", [*before, unit]), ("snapshot", before)):
            with Client(path) as client:
                client.hello().option(nbd.STRUCTURED_REPLY)
                reply = client.meta(nbd.LIST_META_CONTEXT, export)
                assert set(reply.names) == {"base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"}
            with choosing(path, export, "b") as client:
                offset, found = 0, []
                for length, flags in dirty(client):
                    found += [offset // CLUSTER] * flags
                    offset += length
                assert (offset, found) == (SIZE, units)
        before.append(unit)
        assert serving.end() == (0, "", "")
    with cbwcore.Disk(image) as disk:
        assert list(disk.bitmaps) == ["unasked", "a", "b"]
        for bitmap in disk.bitmaps.values():
            assert bitmap.persistent
            assert list(bitmap.ranges()) == [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)]


def test_bitmaps_survive_a_kill(serve, image, path):
    serving = serve(image, "--socket", path, "--bitmap", "a").ready()
    with connected(path) as guest:
        guest.ok(nbd.WRITE, 2 * CLUSTER, 0, WRITTEN)
        serving.end(signal.SIGKILL)
    with cbwcore.Disk(image) as disk:
        assert list(disk.bitmaps["a"].ranges()) == [(2 * CLUSTER, CLUSTER)]


def test_a_file_of_bitmaps_elsewhere(serve, image, path, place, left):
    own = place / "own"
    assert serve(image, "--socket", path, "--bitmap", "a", "--bitmaps", own).ready().end() == (0, "", "")
    assert left() == ["own"]
    with cbwcore.Disk(image, bitmaps=own) as disk:
        assert list(disk.bitmaps) == ["a"]


def test_bitmaps_of_a_disk_that_is_read_only(serve, image, path, left):
    """Those that there are; others in memory, for nothing is written."""
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("a", persistent=True)
        disk.pwrite(WRITTEN, CLUSTER)
    before = (image.parent / f"{image.name}.cbw-bitmaps").read_bytes()
    serving = serve(image, "--socket", path, "--read-only", "--bitmap", "a", "--bitmap", "new").ready()
    for export in ("disk", "snapshot"):
        for bitmap, flags in (("a", [0, 1, 0]), ("new", [0])):
            with choosing(path, export, bitmap) as client:
                assert [each[1] for each in dirty(client)] == flags
    assert serving.end() == (0, "", "")
    assert (image.parent / f"{image.name}.cbw-bitmaps").read_bytes() == before


def test_a_block_device_without_a_file_has_them_in_memory(serve, image, path, resources, left):
    try:
        os.truncate(image, 16 * CLUSTER)
        device = resources.loop(str(image))
    except RuntimeError as e:
        pytest.skip(str(e))
    serving = serve(device, "--socket", path, "--no-snapshot", "--bitmap", "a").ready()
    with choosing(path, "disk", "a") as client:
        assert dirty(client, 16 * CLUSTER) == [(16 * CLUSTER, 0)]
    assert serving.end() == (0, "", "")
    assert left() == []


@pytest.mark.parametrize("damage", ["inconsistent", "damaged"])
def test_a_bitmap_that_would_say_too_little_is_not_shown_and_the_guest_is_served(serve, image, path, damage):
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("a", persistent=True)
        disk.bitmaps.add("b", persistent=True)
    if damage == "inconsistent":
        image.write_bytes(pattern(SIZE))
    else:
        (image.parent / f"{image.name}.cbw-bitmaps").write_bytes(b"")
    serving = serve(image, "--socket", path, "--bitmap", "a").ready()
    with Client(path) as client:
        client.hello().option(nbd.STRUCTURED_REPLY)
        assert client.meta(nbd.LIST_META_CONTEXT, "disk").names == ["base:allocation"]
    with connected(path) as guest:
        guest.ok(nbd.WRITE, 0, 0, WRITTEN)
    status, out, err = serving.end()
    assert (status, out) == (0, "")
    assert "bitmap 'a' is not shown: " in err
    assert damage in err


@pytest.mark.parametrize("discard", [False, True])
def test_discard_is_asked_for(serve, image, path, discard):
    serving = serve(image, "--socket", path, *(["--discard"] if discard else [])).ready()
    with connected(path, "snapshot") as reader:
        assert bool(reader.flags & nbd.SEND_TRIM) is discard
        assert reader.call(nbd.TRIM, 0, CLUSTER).error == (0 if discard else nbd.EPERM)
        assert reader.call(nbd.READ, 0, CLUSTER).error == (nbd.EIO if discard else 0)
    assert serving.end() == (0, "", "")


def test_direct(serve, image, path):
    try:
        cbwcore.Disk(image, direct=True).close()
    except cbwcore.ConfigError:
        status, _, err = serve(image, "--socket", path, "--direct").end(None)
        assert status == 1
        assert "has no O_DIRECT" in one_line(err)
        return
    serving = serve(image, "--socket", path, "--direct", "--io", "psync").ready()
    with connected(path) as client:
        client.ok(nbd.WRITE, 3, 0, WRITTEN)
        assert client.read(0, 10) == pattern(SIZE)[:3] + WRITTEN[:7]
    assert serving.end() == (0, "", "")


def test_a_break_is_told_in_one_line_with_its_cause(serve, image, path):
    serving = serve(
        image, "--socket", path, "--on-cbw-error", "break-snapshot", "--target-limit", "64K", "--cbw-timeout", "30"
    ).ready()
    with connected(path) as guest, connected(path, "snapshot") as reader:
        guest.ok(nbd.WRITE, 0, 0, WRITTEN)
        assert reader.read(0, SIZE) == pattern(SIZE)
        guest.ok(nbd.WRITE, CLUSTER, 0, WRITTEN)
        assert reader.call(nbd.READ, 0, 1).error == nbd.EIO
        line = serving.process.stderr.readline().decode()
        assert one_line(line) == (
            f"cbwcore: {image}: snapshot 'snapshot' is broken: [Errno 28] copy-before-write failed in target-write "
            f"at offset {CLUSTER}, length {CLUSTER}: No space left on device"
        )
    assert serving.end() == (0, "", "")


def test_the_other_policy_refuses_the_write(serve, image, path):
    serving = serve(image, "--socket", path, "--target-limit", "0").ready()
    with connected(path) as guest, connected(path, "snapshot") as reader:
        assert guest.call(nbd.WRITE, 0, 0, WRITTEN).error == nbd.EIO
        assert reader.read(0, SIZE) == pattern(SIZE)
    assert serving.end() == (0, "", "")


def test_limits_and_users(serve, image, path):
    serving = serve(image, "--socket", path, "--max-connections", "1", "--allow-uid", str(os.geteuid())).ready()
    with connected(path), Client(path) as second:
        assert second.dropped() == b""
    status, _, err = serving.end()
    assert status == 0
    assert "refused: there are 1 connections, the limit" in one_line(err)
    serving = serve(image, "--socket", path, "--allow-uid", str(os.geteuid() + 1)).ready()
    with Client(path) as stranger:
        assert stranger.dropped() == b""
    assert f"refused: user {os.geteuid()} may not connect" in one_line(serving.end()[2])


def test_a_client_that_breaks_the_protocol_is_told_of_in_one_line(serve, image, path):
    serving = serve(image, "--socket", path).ready()
    with Client(path) as client:
        client.hello()
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(Disconnected):
            client.dropped()
    with connected(path) as client:
        client.send(b"x" * 28)
        assert client.dropped() == b""
    status, _, err = serving.end()
    assert status == 0
    first, second = err.splitlines()
    assert "dropped in the handshake: bad magic" in first
    assert "export 'disk': bad magic" in second


def test_tls(serve, image, certificates):
    need("nbdcopy")
    serving = serve(image, "--listen", "localhost:0", "--tls-dir", certificates)
    uri = serving.line().split()[1]
    assert uri.startswith("nbds://localhost:")
    serving.ready()
    command = ["nbdcopy", f"{uri}?tls-certificates={certificates}", "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == pattern(SIZE)
    assert serving.end() == (0, "", "")


def test_tls_may_be_left_to_the_client_on_a_unix_socket(serve, image, path, certificates):
    serving = serve(image, "--socket", path, "--tls-dir", certificates, "--tls", "allow").ready()
    with connected(path) as client:
        assert client.read(0, 6) == pattern(SIZE)[:6]
    assert serving.end() == (0, "", "")
