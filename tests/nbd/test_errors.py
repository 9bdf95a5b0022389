"""What goes wrong below the server, and what its clients are told of it: the protocol's errnos alone."""

import errno
import threading

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, G, S, assert_t0, file_bytes, pattern, stalled, until
from nbd_support import Disconnected

import cbwcore

NEW = b"n" * 4096
CHANGES = [nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM]


def change(client, cmd, offset, length=4096, flags=0):
    """A guest write of that kind."""
    return client.call(cmd, offset, length, b"n" * length if cmd == nbd.WRITE else b"", flags=flags)


# ---- a copy that fails, under break-guest-write ----


@pytest.mark.parametrize("cmd", CHANGES)
def test_a_full_target_is_eio_to_the_guest_and_never_enospc(host, structured, cmd):
    """A hypervisor pauses its guest on ENOSPC, and this is no fault of the guest's disk."""
    disk = host.disk()
    snap = host.snapshot(disk, target_limit=CLUSTER)
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    assert change(guest, cmd, 0).error == 0
    assert change(guest, cmd, CLUSTER).error == nbd.EIO
    assert change(guest, cmd, 2 * CLUSTER, 2 * CLUSTER).error == nbd.EIO
    assert change(guest, cmd, 4096).error == 0  # that cluster has been copied
    assert file_bytes(disk.path, CLUSTER) == disk.t0[CLUSTER:]
    assert reader.read(0, disk.size) == disk.t0
    assert snap.state == "armed"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("cmd", CHANGES)
def test_whatever_the_target_fails_with_is_eio(host, rig, cmd, code):
    disk = host.disk()
    snap = host.snapshot(disk)
    plan = rig.plan(snap)
    plan.error("pwrite", code)
    guest = host.open()
    assert change(guest, cmd, 0).error == nbd.EIO
    assert file_bytes(disk.path) == disk.t0
    plan.release()
    assert change(guest, cmd, 0).error == 0
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ENXIO])
def test_a_source_read_that_fails_is_eio(host, rig, code):
    disk = host.disk()
    snap = host.snapshot(disk)
    rig.plan(disk).error("pread", code, times=1)
    guest = host.open()
    assert change(guest, nbd.WRITE, 0).error == nbd.EIO
    assert change(guest, nbd.WRITE, 0).error == 0
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("cmd", CHANGES)
def test_a_copy_that_times_out_is_eio(host, rig, structured, cmd):
    disk = host.disk()
    snap = host.snapshot(disk, cbw_timeout=0.05)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    assert change(guest, cmd, 0).error == nbd.EIO
    assert reader.read(0, disk.size) == disk.t0
    assert snap.stats().timeouts == 1
    plan.release()
    until(lambda: change(guest, cmd, 0).error == 0, "the write, once the target goes on")
    assert reader.read(0, disk.size) == disk.t0


# ---- the same under break-snapshot ----


@pytest.mark.parametrize("cmd", CHANGES)
@pytest.mark.parametrize("cause", ["full", "error", "timeout"])
def test_break_snapshot_lets_the_guest_go_on_and_fails_the_readers_for_good(host, rig, structured, cmd, cause):
    told = []
    options = {"full": {"target_limit": 0}, "error": {}, "timeout": {"cbw_timeout": 0.05}}[cause]
    disk = host.disk()
    snap = host.snapshot(disk, on_cbw_error=S, on_break=told.append, **options)
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    assert reader.read(0, disk.size) == disk.t0
    if cause == "error":
        rig.plan(snap).error("pwrite", errno.EIO, times=1)
    elif cause == "timeout":
        rig.plan(snap).stall("pwrite")
    assert change(guest, cmd, 0).error == 0
    for _ in range(2):
        reply = reader.call(nbd.READ, 2 * CLUSTER, 512)
        assert (reply.error, reply.data) == (nbd.EIO, b"")
    assert change(guest, cmd, CLUSTER).error == 0
    expected = NEW if cmd == nbd.WRITE else bytes(4096)
    assert guest.read(CLUSTER, 4096) == expected
    assert snap.state == "broken"
    until(lambda: told == [snap], "the on_break callback")


def test_the_callback_of_a_break_may_take_the_export_and_the_snapshot_away(host, rig):
    """It runs in a thread of the server's, which must not wait for itself."""
    done = threading.Event()

    def on_break(broken):
        host.server.remove_export("snapshot")
        broken.close()
        done.set()

    disk = host.disk()
    snap = host.snapshot(disk, on_cbw_error=S, target_limit=0, on_break=on_break)
    guest, reader = host.open(), host.open("snapshot")
    assert reader.read(0, 9) == disk.t0[:9]
    guest.ok(nbd.WRITE, 0, 0, NEW)
    assert done.wait(LIMIT)
    assert reader.dropped() == b""
    assert (snap.state, host.server.exports) == ("closed", ("disk",))
    assert guest.read(0, 4096) == NEW


def test_the_block_status_of_a_broken_snapshot_is_eio(host, rig):
    disk = host.disk()
    snap = host.snapshot(disk, on_cbw_error=S)
    guest, reader = host.open(), host.open("snapshot", contexts=["base:allocation"])
    reader.ok(nbd.BLOCK_STATUS, 0, disk.size)
    rig.plan(snap).error("pwrite", errno.EIO, times=1)
    guest.ok(nbd.WRITE, 0, 0, NEW)
    assert reader.call(nbd.BLOCK_STATUS, 0, disk.size).error == nbd.EIO
    assert reader.call(nbd.BLOCK_STATUS, CLUSTER, 1, flags=nbd.REQ_ONE).error == nbd.EIO


def test_a_snapshot_that_breaks_while_it_is_read_gives_t0_or_eio(host, rig, structured):
    """R7: the read is in flight at the break, and never returns newer data."""
    disk = host.disk()
    snap = host.snapshot(disk, on_cbw_error=S)
    plan = rig.plan(disk)
    plan.stall("pread", start=CLUSTER, times=1)
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    slow = reader.request(nbd.READ, 0, 2 * CLUSTER)
    stalled(plan)
    rig.plan(snap).error("pwrite", errno.EIO)
    guest.ok(nbd.WRITE, 3 * CLUSTER, 0, NEW)
    handle = guest.request(nbd.WRITE, CLUSTER, 0, b"m" * CLUSTER)
    plan.release()
    reply = reader.reply(slow)
    assert reply.error == nbd.EIO or reply.data == disk.t0[: 2 * CLUSTER]
    assert guest.reply(handle).error == 0


# ---- the disk ----

MAPPED = {
    errno.EIO: nbd.EIO,
    errno.EACCES: nbd.EIO,
    errno.ETIMEDOUT: nbd.EIO,
    errno.EROFS: nbd.EIO,
    errno.ENXIO: nbd.EIO,
    errno.EBADF: nbd.EIO,
    errno.EPERM: nbd.EIO,
    errno.EOVERFLOW: nbd.EIO,
    errno.ESHUTDOWN: nbd.EIO,
    errno.EDQUOT: nbd.EIO,
    errno.EFBIG: nbd.EIO,
    errno.ENOSPC: nbd.ENOSPC,
    errno.ENOMEM: nbd.ENOMEM,
}


@pytest.mark.parametrize(("code", "error"), MAPPED.items())
@pytest.mark.parametrize(("cmd", "op"), [(nbd.WRITE, "pwrite"), (nbd.WRITE_ZEROES, "zero"), (nbd.TRIM, "discard")])
@pytest.mark.parametrize("armed", [False, True], ids=["plain", "armed"])
def test_an_error_of_the_disk_goes_out_as_an_errno_of_the_protocol(host, rig, structured, code, error, cmd, op, armed):
    disk = host.disk()
    if armed:
        snap = host.snapshot(disk)
    plan = rig.plan(disk)
    plan.error(op, code)
    guest = host.open(structured=structured)
    assert change(guest, cmd, 0, CLUSTER).error == error
    assert file_bytes(disk.path) == disk.t0
    plan.release()
    assert change(guest, cmd, 0, CLUSTER).error == 0
    if armed:
        assert_t0(snap, disk.t0)


NO_FAULT_OF_THE_REQUEST = [errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EOVERFLOW, errno.ESHUTDOWN]


@pytest.mark.parametrize("code", NO_FAULT_OF_THE_REQUEST)
@pytest.mark.parametrize("flags", [0, nbd.FUA])
@pytest.mark.parametrize("name", ["pwrite", "flush"])
def test_what_the_protocol_says_of_requests_is_not_said_of_the_disk(host, rig, structured, code, flags, name):
    """EINVAL, EPERM: the client did wrong; ENOTSUP: FAST_ZERO would be slow; EOVERFLOW: DF is too long."""
    disk = host.disk()
    plan = rig.plan(disk)
    plan.error(name, code)
    guest = host.open(structured=structured)
    if name == "pwrite":
        plan.error("zero", errno.EOPNOTSUPP)  # so zeroes are written
        assert change(guest, nbd.WRITE, 0, flags=flags).error == nbd.EIO
        assert change(guest, nbd.WRITE, 0, 3 * CLUSTER, flags=flags).error == nbd.EIO
        assert change(guest, nbd.WRITE_ZEROES, 0, flags=flags).error == nbd.EIO
    else:
        assert change(guest, nbd.WRITE, 0, flags=flags).error == (nbd.EIO if flags else 0)
        assert guest.call(nbd.FLUSH).error == nbd.EIO
    assert guest.call(nbd.FLUSH, 1).error == guest.call(99).error == nbd.EINVAL  # the request's own


@pytest.mark.parametrize("cmd", [nbd.WRITE, nbd.WRITE_ZEROES])
@pytest.mark.parametrize("code", [*NO_FAULT_OF_THE_REQUEST, errno.ENOMEM, errno.ENOSPC])
def test_nor_is_it_of_the_target_or_of_what_is_copied(host, rig, structured, cmd, code):
    disk = host.disk()
    snap = host.snapshot(disk)
    guest = host.open(structured=structured)
    plan = rig.plan(snap)
    plan.error("pwrite", code)
    assert change(guest, cmd, 0).error == nbd.EIO
    plan.release()
    rig.plan(disk).error("pread", code, times=1)
    assert change(guest, cmd, 0).error == nbd.EIO


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EFAULT, *NO_FAULT_OF_THE_REQUEST])
@pytest.mark.parametrize("length", [512, CLUSTER, 3 * CLUSTER])
def test_a_read_that_fails_brings_an_error_and_no_data(host, rig, structured, code, length):
    disk = host.disk()
    host.snapshot(disk)
    plan = rig.plan(disk)
    for name in ("disk", "snapshot"):
        client = host.open(name, structured=structured)
        plan.error("pread", code, start=0, end=CLUSTER)
        reply = client.call(nbd.READ, 0, length)
        assert (reply.error, reply.data) == (nbd.EIO, b"")
        assert client.read(3 * CLUSTER, 512) == disk.t0[3 * CLUSTER :][:512]
        plan.release()
        assert client.read(0, length) == disk.t0[:length]


def test_a_target_that_cannot_be_read_is_eio_to_the_reader_alone(host, rig, structured):
    disk = host.disk()
    snap = host.snapshot(disk)
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    guest.ok(nbd.WRITE, 0, 0, NEW)
    plan = rig.plan(snap)
    plan.error("pread", errno.ENOSPC)
    assert reader.call(nbd.READ, 0, 512).error == nbd.EIO
    assert guest.read(0, 4096) == NEW
    plan.release()
    assert reader.read(0, disk.size) == disk.t0


def test_a_flush_that_failed_fails_for_good(host, rig, structured):
    """What the kernel dropped is not there at the next flush, which would succeed, and lie (R14)."""
    disk = host.disk()
    guest, other = host.open(structured=structured), host.open(structured=structured)
    guest.ok(nbd.WRITE, 0, 0, NEW)
    rig.plan(disk).error("flush", errno.EIO, times=1)
    assert guest.call(nbd.FLUSH).error == nbd.EIO
    assert other.call(nbd.FLUSH).error == nbd.EIO


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (CLUSTER - 1, 2), (2 * CLUSTER - 1, 2), (0, 4 * CLUSTER), (3 * CLUSTER, 512)]
)
def test_a_read_that_touches_what_the_snapshot_does_not_cover_is_eio(host, structured, offset, length):
    disk = host.disk()
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(CLUSTER, CLUSTER)
    host.snapshot(disk, bitmap=scope)
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    for _ in range(2):
        reply = reader.call(nbd.READ, offset, length)
        assert (reply.error, reply.data) == (nbd.EIO, b"")
        assert reader.read(CLUSTER, CLUSTER) == disk.t0[CLUSTER : 2 * CLUSTER]
        guest.ok(nbd.WRITE, 0, 0, b"n" * disk.size)  # newer data do not come out either


# ---- what is closed or removed under its clients ----

REQUESTS = [
    (nbd.READ, 0, 512),
    (nbd.READ, 0, 4 * CLUSTER),
    (nbd.WRITE, 0, 0, NEW),
    (nbd.WRITE, 0, 0, b"n" * (3 * CLUSTER)),
    (nbd.WRITE_ZEROES, 0, 512),
    (nbd.TRIM, 0, CLUSTER),
    (nbd.FLUSH,),
    (nbd.BLOCK_STATUS, 0, 512),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r[0]}-{len(r[3]) if len(r) > 3 else 0}")
def test_a_disk_that_was_closed_is_shut_down(host, request_):
    disk = host.disk()
    client = host.open(contexts=["base:allocation"])
    client.read(0, 1)  # the transmission phase has begun on the server's side, too
    disk.close()
    for _ in range(2):
        assert client.call(*request_).error == nbd.ESHUTDOWN
    assert client.call(nbd.READ, 5 * CLUSTER, 1).error in (nbd.EINVAL, nbd.ESHUTDOWN)
    assert file_bytes(disk.path) == disk.t0


def test_a_read_of_nothing_and_cache_of_a_closed_disk_are_answered(host):
    disk = host.disk()
    client = host.open()
    client.read(0, 1)
    disk.close()
    for request in ((nbd.READ, 0, 0), (nbd.CACHE, 0, 512), (nbd.WRITE, 0, 0)):
        assert client.call(*request).error in (0, nbd.ESHUTDOWN)


@pytest.mark.parametrize("whole", ["snapshot", "disk"])
def test_a_snapshot_that_was_closed_is_shut_down(host, structured, whole):
    disk = host.disk()
    snap = host.snapshot(disk)
    reader = host.open("snapshot", structured=structured, contexts=["base:allocation"] if structured else [])
    reader.read(0, 1)
    (snap if whole == "snapshot" else disk).close()
    assert reader.call(nbd.READ, 0, 512).error == nbd.ESHUTDOWN
    assert reader.call(nbd.READ, 0, 4 * CLUSTER).error == nbd.ESHUTDOWN
    if structured:
        assert reader.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.ESHUTDOWN
    if whole == "snapshot":
        assert host.open().read(0, disk.size) == disk.t0


def test_a_disk_is_closed_while_its_clients_use_it(host, rig, structured):
    """Every request is answered: done, or ESHUTDOWN from some moment on."""
    disk = host.disk(pattern(1 << 20))
    snap = host.snapshot(disk)
    guests = [host.open(structured=structured) for _ in range(2)]
    reader = host.open("snapshot", structured=structured)

    def use(client):
        number = 0
        while True:
            at = number * 4096 % disk.size
            writes = client in guests and number % 2
            reply = client.call(nbd.WRITE, at, 0, NEW) if writes else client.call(nbd.READ, at, 4096)
            if reply.error:
                return reply.error
            assert client in guests or reply.data == disk.t0[at : at + 4096]
            number += 1

    users = [rig.run(use, client) for client in (*guests, reader)]
    until(lambda: disk.stats().guest_reads > 50, "some use")
    disk.close()
    assert [user.result() for user in users] == [nbd.ESHUTDOWN] * 3
    assert snap.state == "closed"


def test_a_snapshot_is_closed_while_clients_read_it_and_guests_write(host, rig, structured):
    """Its readers get T0 or ESHUTDOWN, and never what the guest wrote."""
    disk = host.disk(pattern(64 * CLUSTER))
    snap = host.snapshot(disk)
    readers = [host.open("snapshot", structured=structured) for _ in range(2)]
    guest = host.open(structured=structured)

    def read(client):
        position = 0
        while True:
            reply = client.call(nbd.READ, position, CLUSTER)
            if reply.error:
                return reply.error
            assert reply.data == disk.t0[position : position + CLUSTER]
            position = (position + CLUSTER) % disk.size

    runs = [rig.run(read, client) for client in readers]
    for position in range(0, disk.size, CLUSTER):
        guest.ok(nbd.WRITE, position, 0, b"n" * CLUSTER)
        if position == disk.size // 2:
            snap.close()
    assert [run.result() for run in runs] == [nbd.ESHUTDOWN] * 2
    assert guest.read(0, disk.size) == b"n" * disk.size


def test_close_waits_for_a_snapshot_read_in_flight_which_gives_t0_or_shutdown(host, rig, structured):
    disk = host.disk()
    snap = host.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = host.open("snapshot", structured=structured)
    slow = reader.request(nbd.READ, 0, CLUSTER)
    stalled(plan)
    closer = rig.run(snap.close)
    plan.release()
    closer.result()
    reply = reader.reply(slow)
    assert reply.error == nbd.ESHUTDOWN or reply.data == disk.t0[:CLUSTER]


def test_an_export_is_removed_while_its_requests_are_in_flight(host, rig, structured):
    """They are finished and answered, then its connections end; those of the other export go on."""
    disk = host.disk()
    snap = host.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest, idle = host.open(structured=structured), host.open(structured=structured)
    reader = host.open("snapshot", structured=structured)
    slow = guest.request(nbd.WRITE, 0, 0, NEW)
    stalled(plan)
    remover = rig.run(host.server.remove_export, "disk")
    assert idle.dropped() == b""
    assert not remover.done
    assert host.hello().go("disk").error == nbd.ERR_UNKNOWN
    plan.release()
    assert guest.reply(slow).error == 0
    assert guest.dropped() == b""
    remover.result()
    assert disk.pread(4096, 0) == NEW
    assert reader.read(0, disk.size) == disk.t0
    host.server.add_export("disk", disk, writable=True)
    assert host.open(structured=structured).read(0, 4096) == NEW


def test_remove_returns_when_no_client_is_left(host, structured):
    disk = host.disk()
    clients = [host.open(structured=structured) for _ in range(5)]
    for client in clients:
        client.read(0, 512)
    host.server.remove_export("disk")
    assert host.server.connections == 0
    disk.close()
    assert [client.dropped() for client in clients] == [b""] * 5


def test_remove_ends_a_client_that_has_stopped_in_a_payload(host, rig, structured):
    disk = host.disk()
    client = host.open(structured=structured)
    client.send(nbd.header(nbd.WRITE, 0, 3 * CLUSTER) + b"n" * CLUSTER)
    rig.run(host.server.remove_export, "disk").result()
    with pytest.raises(Disconnected):
        client.reply()
    assert file_bytes(disk.path) == disk.t0


def test_close_with_an_error_of_each_kind_behind_it_ends(host, rig):
    """Broken, closed, removed: close() has nothing to say."""
    disk = host.disk()
    host.snapshot(disk, on_cbw_error=S, target_limit=0)
    guest, reader = host.open(), host.open("snapshot")
    guest.ok(nbd.WRITE, 0, 0, NEW)
    assert reader.call(nbd.READ, 0, 1).error == nbd.EIO
    host.server.remove_export("disk")
    disk.close()
    host.server.close()
    assert reader.dropped() == b""


def test_the_policy_may_change_while_clients_are_connected(host, rig):
    disk = host.disk()
    snap = host.snapshot(disk, target_limit=0, on_cbw_error=G)
    guest, reader = host.open(), host.open("snapshot")
    assert change(guest, nbd.WRITE, 0).error == nbd.EIO
    assert reader.read(0, disk.size) == disk.t0
    snap.on_cbw_error = S
    assert change(guest, nbd.WRITE, 0).error == 0
    assert reader.call(nbd.READ, 0, 1).error == nbd.EIO
