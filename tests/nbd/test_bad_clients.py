"""Clients that do wrong, and the guest beside them: its requests are all answered rightly, and not held up."""

import contextlib
import copy
import random
import socket
import statistics
import struct
import sys
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, assert_t0, file_bytes, pattern, settled, stalled, until
from nbd_support import Client, Disconnected

from cbwcore.nbd import TlsConfig

MIB = 1 << 20
ALLOWED = 0.001  # seconds that a bad client may cost a guest
ALLOWED_ONCE = 0.01  # and the slowest of its requests: a busy machine of two cores gives that to one and not another
ATTEMPTS = 8
SECONDS = 0.8  # of an attempt: longer than STALL, so that clients are dropped in it
STALL = 0.5
TURNS = 60  # at least


class SmallRequests:
    """A guest that writes and reads back; a turn's seconds are of each of its requests."""

    def __init__(self, client, length=4096):
        self.client = client
        self.length = length
        self.rng = random.Random(length)
        self.number = 0

    def turn(self):
        offset = self.rng.randrange(self.client.size - self.length)
        self.number += 1
        data = bytes([self.number % 255 + 1]) * self.length
        started = time.perf_counter()
        self.client.ok(nbd.WRITE, offset, 0, data)
        written = time.perf_counter()
        assert self.client.read(offset, self.length) == data
        return [written - started, time.perf_counter() - written]


class DeepWrites:
    """A guest that has many writes in flight, to clusters that are still to be copied; a turn's seconds are of all."""

    def __init__(self, client, length=4096, depth=8, step=CLUSTER):
        self.client = client
        self.length, self.depth, self.step = length, depth, step
        self.position = 0

    def turn(self):
        heads = []
        for _ in range(self.depth):
            heads.append(self.client.expect(nbd.WRITE, self.position, self.length) + b"d" * self.length)
            self.position = (self.position + self.step) % (self.client.size - self.length)
        started = time.perf_counter()
        self.client.send(b"".join(heads))
        assert [self.client.reply().error for _ in heads] == [0] * self.depth
        return [time.perf_counter() - started]


class Side:
    """A server, a disk that several guests write, and a snapshot that is copied to."""

    def __init__(self, host, size, guests, **limits):
        self.host = host
        self.server = host.serve(**{"stall_seconds": STALL} | limits)
        self.disk = host.disk(pattern(size), server=self.server)
        self.snap = host.snapshot(self.disk, server=self.server)
        self.guests = guests(self)

    def open(self):
        return self.host.open(server=self.server)

    @contextlib.contextmanager
    def to_copy(self):
        """Every cluster is to be copied once more."""
        with self.host.rig.snapshot(self.disk, cluster_size=4096):
            yield


class Attackers:
    """A host whose clients are closed when the attack has gone on to the next but one."""

    def __init__(self, host, server, bad, seed):
        self.stop = threading.Event()
        self._server, self._bad, self._rng = server, bad, random.Random(seed)
        self._host = host
        self.rounds = 0

    def run(self):
        waves = []
        try:
            while not self.stop.is_set():
                waves.append(copy.copy(self._host))
                waves[-1]._undo = contextlib.ExitStack()
                with contextlib.suppress(Disconnected, TimeoutError, OSError):  # it is dropped, or refused
                    self._bad(waves[-1], self._server, self._rng)
                self.rounds += 1
                self.stop.wait(0.05 if len(waves) == 1 else 1.2 * STALL)  # those that stall are dropped meanwhile
                if len(waves) == 2:
                    waves.pop(0)._undo.close()
        finally:
            for wave in waves:
                wave._undo.close()


def measure(sides, ends):
    """name → (seconds of the first side, of the second), of requests in turn, so that noise comes to both."""
    found = {name: ([], []) for name in sides[0].guests}
    turns = 0
    while turns < TURNS or time.monotonic() < ends:
        turns += 1
        for name, (control, beside) in found.items():
            first, second = ((control, 0), (beside, 1))[:: 1 if turns % 2 else -1]
            first[0].extend(sides[first[1]].guests[name].turn())
            second[0].extend(sides[second[1]].guests[name].turn())
    return found


def nearly_slowest(seconds):
    """The 99th percentile; of few requests the 90th, for the 99th were the slowest."""
    return sorted(seconds)[int(len(seconds) * (0.99 if len(seconds) >= 300 else 0.9))]


def held_up(control, beside):
    """What is slower than it may be; None where nothing is."""
    for which, figure, allowed in (
        ("p50", statistics.median, ALLOWED),
        ("nearly the slowest", nearly_slowest, ALLOWED),
        ("slowest", max, ALLOWED_ONCE),
    ):
        if figure(beside) > figure(control) + max(allowed, figure(control) / 4):
            return f"{which} {figure(beside) * 1e6:.0f} us, {figure(control) * 1e6:.0f} us beside none"
    return None


def assert_unhurt(host, bad, rng, size, guests, **limits):
    """While the attack goes on, again and again, the guests of its server are as quick as those of another, of the same
    process, which nobody attacks. Noise comes and goes; a guest that is held up is so in every attempt."""
    sides = [Side(host, size, guests, **limits) for _ in range(2)]
    attackers = Attackers(host, sides[1].server, bad, rng.random())
    attack = host.rig.run(attackers.run)
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # the attack is in this process
    try:
        until(lambda: attackers.rounds or attack.done, "the attack")
        for _ in range(ATTEMPTS):
            with sides[0].to_copy(), sides[1].to_copy():
                found = measure(sides, time.monotonic() + SECONDS)
            slow = {name: held_up(*seconds) for name, seconds in found.items()}
            if not any(slow.values()):
                break
    finally:
        sys.setswitchinterval(before)
        attackers.stop.set()
        attack.result()
    assert not any(slow.values()), slow
    for side in sides:
        assert_t0(side.snap, side.disk.t0)


# Each takes (host, server, rng), does its wrong, and returns what must stay open while the guest is measured.


def garbage_at_once(host, server, rng):
    for _ in range(10):
        client = host.connect(server)
        with contextlib.suppress(Disconnected):
            client.send(rng.randbytes(100_000))


def garbage_as_options(host, server, rng):
    for _ in range(10):
        client = host.hello(server)
        with contextlib.suppress(Disconnected):
            client.send_option(rng.randrange(12), rng.randbytes(rng.randrange(60000)))
            client.send(rng.randbytes(1000))


def garbage_as_requests(host, server, rng):
    for _ in range(10):
        client = host.open(server=server)
        with contextlib.suppress(Disconnected):
            client.send(rng.randbytes(100_000))


def requests_of_every_kind_of_nonsense(host, server, rng):
    client = host.open("snapshot", server=server)
    for _ in range(1000):
        cmd, flags = rng.choice([*range(9), 99, 0xFFFF]), rng.randrange(1 << 16)
        if cmd not in (nbd.WRITE, nbd.DISC):
            assert client.call(cmd, rng.getrandbits(64), rng.getrandbits(32), flags=flags).error


def connects_and_says_nothing(host, server, rng):
    for _ in range(10):
        host.connect(server)


def stalls_in_an_option(host, server, rng):
    host.hello(server).send_option(nbd.GO, b"\0\0\0\4di", length=60000)


def stalls_in_a_header(host, server, rng):
    host.open(server=server).send(nbd.header(nbd.WRITE, 0, 4096)[:20])


def stalls_in_a_small_payload(host, server, rng):
    host.open(server=server).send(nbd.header(nbd.WRITE, 0, 4096) + b"n" * 100)


def stalls_in_a_large_payload(host, server, rng):
    host.open(server=server).send(nbd.header(nbd.WRITE, 0, 4 * MIB) + b"n" * MIB)


def stalls_in_many_payloads(host, server, rng):
    """Half of each has been taken when this returns."""
    for _ in range(8):
        host.open(server=server).send(nbd.header(nbd.WRITE, 0, 4 * MIB) + b"n" * (2 * MIB))


def stalls_in_what_is_drained(host, server, rng):
    host.open("snapshot", server=server).send(nbd.header(nbd.WRITE, 0, 60 * MIB) + b"n" * MIB)


def vanishes_in_payloads(host, server, rng):
    for length in (100, 4096, MIB, 4 * MIB):
        for part in (0, 1, length // 2, length - 1):
            client = host.open(server=server)
            client.send(nbd.header(nbd.WRITE, 0, length) + b"n" * part)
            client.sock.close()


def asks_for_four_gib(host, server, rng):
    client = host.open("snapshot", server=server)
    for _ in range(100):
        for cmd in (nbd.READ, nbd.CACHE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS):
            client.request(cmd, 0, 2**32 - 1)
        while client.pending:
            assert client.reply().error in (nbd.EINVAL, nbd.ENOSPC, nbd.EPERM)
    for _ in range(10):
        host.open(server=server).send(nbd.header(nbd.WRITE, 0, 2**32 - 1) + bytes(1000))


def never_reads_large_replies(host, server, rng):
    client = host.open("snapshot", server=server)
    client.send(b"".join(nbd.header(nbd.READ, 0, 4 * MIB, handle=n) for n in range(64)))
    settled(lambda: host.unread(client))


def never_reads_large_replies_with_many_connections(host, server, rng):
    """They hold all of the bytes in flight."""
    clients = [host.open("snapshot", server=server) for _ in range(8)]
    for client in clients:
        client.send(b"".join(nbd.header(nbd.READ, 0, 4 * MIB, handle=n) for n in range(64)))
    settled(lambda: [host.unread(client) for client in clients])


def never_reads_small_replies(host, server, rng):
    client = host.open("snapshot", server=server, timeout=0.2)
    with contextlib.suppress(TimeoutError):
        while True:
            client.send(nbd.header(nbd.READ, 0, 4096) * 1000)


def never_reads_the_handshake(host, server, rng):
    client = host.hello(server, timeout=0.2)
    with contextlib.suppress(TimeoutError, Disconnected):
        for _ in range(1000):
            client.send_option(99, bytes(60000))


BAD = [
    garbage_at_once,
    garbage_as_options,
    garbage_as_requests,
    requests_of_every_kind_of_nonsense,
    connects_and_says_nothing,
    stalls_in_an_option,
    stalls_in_a_header,
    stalls_in_a_small_payload,
    stalls_in_a_large_payload,
    stalls_in_many_payloads,
    stalls_in_what_is_drained,
    vanishes_in_payloads,
    asks_for_four_gib,
    never_reads_large_replies,
    never_reads_large_replies_with_many_connections,
    never_reads_small_replies,
    never_reads_the_handshake,
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_the_guests_are_not_held_up_by_a_client_that(host, bad, rng, certificates, tls_client):
    """On the same server, with the same exports: one request at a time, many with copies, and under TLS."""

    def guests(side):
        tls = host.hello(side.server).starttls(tls_client)
        assert tls.go("disk").error == 0
        return {"small": SmallRequests(side.open()), "deep": DeepWrites(side.open()), "TLS": SmallRequests(tls)}

    assert_unhurt(
        host, bad, rng, 16 * MIB, guests, bytes_in_flight=64 * MIB, tls=TlsConfig(certificates, required=False)
    )


def stalls_in_payloads_as_large_as_can_be(host, server, rng):
    """As many as all the memory has room for, and some more."""
    for _ in range(12):
        host.open(server=server).send(nbd.header(nbd.WRITE, 0, 32 * MIB) + b"n" * 1000)


def sends_the_largest_payloads_in_drops(host, server, rng):
    clients = [host.open(server=server) for _ in range(12)]
    for client in clients:
        client.send(nbd.header(nbd.WRITE, 0, 32 * MIB) + b"n" * 1000)
    end = time.monotonic() + 2 * STALL
    while time.monotonic() < end:
        for client in clients:
            with contextlib.suppress(Disconnected):
                client.send(b"n" * 100)
        time.sleep(0.01)


def never_reads_the_largest_replies(host, server, rng):
    for _ in range(12):
        host.open("snapshot", server=server).send(nbd.header(nbd.READ, 0, 32 * MIB))


LARGE = [
    stalls_in_a_large_payload,
    never_reads_large_replies,
    stalls_in_payloads_as_large_as_can_be,
    sends_the_largest_payloads_in_drops,
    never_reads_the_largest_replies,
]


@pytest.mark.parametrize("bad", LARGE, ids=lambda bad: bad.__name__)
def test_guests_of_moderate_requests_are_not_held_up_by_clients_that(host, bad, rng):
    """They hold all that clients can of the default 256 MiB, and a guest's 1 MiB finds room at once."""

    def guests(side):
        return {
            "1 MiB": SmallRequests(side.open(), MIB),
            "1.25 MiB, two at once": DeepWrites(side.open(), MIB + MIB // 4, 2, MIB),
        }

    assert_unhurt(host, bad, rng, 33 * MIB, guests)


@pytest.mark.parametrize("pace", [0.0, 1.0], ids=["stalled", "dripping"])
@pytest.mark.parametrize("cmd", [nbd.READ, nbd.WRITE])
def test_a_large_request_is_served_beside_clients_that_hold_all_the_memory(host, rig, cmd, pace):
    """Those have less patience to hope for while others starve, even if they move enough for better times. They
    are more than there is memory for, so that some wait for it before the guest does."""
    stall, count = 2.0, 12
    server = host.serve(stall_seconds=stall)
    disk = host.disk(pattern(33 * MIB), server=server)
    guest = host.open(server=server, timeout=LIMIT)
    guest.read(0, 1)
    bad = [host.open(server=server, timeout=0.2) for _ in range(count)]
    for client in bad:
        client.send(nbd.header(nbd.WRITE, 0, 32 * MIB) + b"n" * 1000)
    settled(lambda: server._service.core._buffers()[1])
    stop = threading.Event()

    def drip(client):
        while not stop.wait(0.05):
            with contextlib.suppress(Disconnected, TimeoutError, OSError):
                client.send(b"n" * int(pace * MIB * 0.05))

    dripping = [rig.run(drip, client) for client in bad] if pace else []
    started = time.monotonic()
    try:
        if cmd == nbd.READ:
            assert guest.read(0, 32 * MIB) == disk.t0[: 32 * MIB]
        else:
            guest.ok(nbd.WRITE, 0, 0, b"g" * (32 * MIB))
    finally:
        stop.set()
    assert time.monotonic() - started < count * stall / 2
    for client in dripping:
        client.result()


@pytest.mark.parametrize(
    "bad", [never_reads_large_replies_with_many_connections, stalls_in_many_payloads], ids=lambda bad: bad.__name__
)
def test_small_requests_that_wait_are_served_beside_clients_that_hold_all_the_memory(host, bad):
    """First writes, of clusters that the others read (R6), and what must be durable."""
    server = host.serve(bytes_in_flight=40 * MIB, request=4 * MIB, connections=12)  # 16 MiB are common
    disk = host.disk(pattern(4 * MIB), server=server)
    snap = host.snapshot(disk, server=server)
    guest = host.open(server=server, contexts=["base:allocation"])
    guest.read(0, 1)
    bad(host, server, None)
    for start in range(0, disk.size, 8 * CLUSTER):  # eight at once, close behind each other
        first = [guest.expect(nbd.WRITE, start + n * CLUSTER, 4096) + b"n" * 4096 for n in range(8)]
        fua = [guest.expect(nbd.WRITE, start + n * CLUSTER + 4096, 4096, flags=nbd.FUA) + b"m" * 4096 for n in range(8)]
        guest.send(b"".join(first + fua))
        assert [guest.reply().error for _ in range(16)] == [0] * 16
    guest.ok(nbd.FLUSH)
    guest.ok(nbd.BLOCK_STATUS, 0, disk.size, flags=nbd.REQ_ONE)
    assert guest.read(0, 100_000)[:8192] == b"n" * 4096 + b"m" * 4096
    assert snap.stats().cbw_bytes == disk.size


def test_an_export_is_removed_while_its_requests_wait_for_memory(host, rig):
    """Another disk's dead target holds all of it, and for ever: what waits must see that its connection is to end."""
    server = host.serve(bytes_in_flight=36 * MIB, request=4 * MIB, connections=12)  # of each, 2 MiB are its own
    disk = host.disk(pattern(32 * MIB), server=server)
    snap = host.snapshot(disk, server=server)
    other = host.disk(pattern(4 * MIB), name="other", server=server)
    waiting = [host.open("other", server=server) for _ in range(3)]
    plan = rig.plan(snap)
    plan.stall("pwrite")
    for number in range(6):
        host.open(server=server).send(nbd.header(nbd.WRITE, number * 4 * MIB, 4 * MIB) + b"n" * (4 * MIB))
    stalled(plan, 6)
    for client in waiting:
        client.request(nbd.READ, 0, 4 * MIB)
    rig.run(server.remove_export, "other").result()
    for client in waiting:
        with contextlib.suppress(Disconnected):
            reply = client.reply()
            assert reply.error in (nbd.ESHUTDOWN, nbd.ENOMEM) or reply.data == other.t0
    plan.release()


def cut_short():
    """Where a client may vanish: in the header of a write, and in its payload."""
    for length in (1, 4096, 65536, 200_000, 3 * MIB):
        whole = nbd.header(nbd.WRITE, 100, length) + b"n" * length
        for part in (1, 4, 16, 27, 28, 29, 28 + length // 2, 28 + length - 1):
            if part < len(whole):
                yield length, part


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_of_a_client_that_vanishes_in_a_request_nothing_is_written_or_copied(host, rig, over):
    server = host.serve() if over == "unix" else host.serve_tcp()
    disk = host.disk(pattern(4 * MIB), server=server)
    snap = host.snapshot(disk, server=server)
    plan = rig.plan(disk)
    for length, part in cut_short():
        client = host.open(server=server)
        client.send((nbd.header(nbd.WRITE, 100, length) + b"n" * length)[:part])
        if over == "tcp" and part % 2:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        client.sock.close()
    host.ended(server)
    assert plan.calls() == []
    assert file_bytes(disk.path) == disk.t0
    stats = snap.stats()
    assert (stats.cbw_copies, stats.cbw_bytes, stats.waits, stats.guest_writes) == (0, 0, 0, 0)
    assert disk.stats().guest_writes == 0
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("tail", [0, 1, 27, 28, 1000])
def test_a_write_before_the_one_that_vanishes_is_done_whole_or_not_at_all(host, tail):
    disk = host.disk()
    snap = host.snapshot(disk)
    client = host.open()
    first = nbd.header(nbd.WRITE, 0, 512) + b"n" * 512
    second = nbd.header(nbd.WRITE, CLUSTER, 4096) + b"m" * 4096
    client.send(first + second[:tail])
    client.sock.close()
    host.ended()
    assert file_bytes(disk.path) in (disk.t0, b"n" * 512 + disk.t0[512:])
    assert_t0(snap, disk.t0)
    assert snap.stats().cbw_copies <= 1


def test_a_client_that_vanishes_while_its_write_waits_for_a_copy(host, rig):
    """The write is done or not; nothing hangs, and the connection's place is given back."""
    disk = host.disk()
    snap = host.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open()
    client.request(nbd.WRITE, 0, 0, b"n" * 512)
    until(lambda: plan.stalled, "the copy")
    client.sock.close()
    guest = host.open()
    assert guest.read(CLUSTER, 512) == disk.t0[CLUSTER : CLUSTER + 512]
    plan.release()
    guest.disconnect()
    host.ended()
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("name", ["disk", "snapshot"])
@pytest.mark.parametrize("length", [512, CLUSTER, MIB])
def test_what_a_client_asked_for_before_it_vanished_is_not_worked_off(host, rig, name, length):
    """128 KiB of requests for 32 MiB each would keep a core busy for a minute, with nobody there to take the data."""
    disk = host.disk(pattern(MIB))
    host.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    client = host.open(name)
    client.send(b"".join(nbd.header(nbd.READ, 0, length, handle=n) for n in range(2000)))
    until(lambda: plan.stalled, "the first read")
    client.sock.close()
    plan.release()
    host.ended()
    assert len(plan.calls("pread")) < 500  # what one batch of answers takes


def test_clients_that_come_and_go_leave_nothing_behind(host):
    """No thread, no descriptor, no byte of the budget: at the end a request as large as that is served."""
    server = host.serve(request=4 * MIB, bytes_in_flight=32 * MIB)
    disk = host.disk(pattern(4 * MIB), server=server)
    for number in range(100):
        if number % 8 == 0:
            host.ended(server)
        client = host.open(server=server)
        client.send(
            [
                nbd.header(nbd.READ, 0, 4 * MIB),
                nbd.header(nbd.WRITE, 0, 4 * MIB) + b"n" * 1000,
                nbd.header(nbd.WRITE, 0, 4096) + b"n" * 1000,
                nbd.header(nbd.READ, 0, 4096) * 100,
            ][number % 4]
        )
        client.sock.close()
    host.ended(server)
    assert host.open(server=server).read(0, 4 * MIB) == disk.t0


@pytest.mark.parametrize("number", range(5))
def test_the_server_closes_while_clients_storm_it(host, rig, number):
    """They connect, use it and vanish at any moment of its end."""
    server = host.serve()
    disk = host.disk(server=server)
    host.snapshot(disk, server=server)
    path = host.paths[server]

    def storm(kind):
        with contextlib.suppress(Disconnected, OSError):
            while True:
                with Client(path, timeout=LIMIT) as client:
                    client.hello().option(nbd.STRUCTURED_REPLY)
                    client.go("disk" if kind % 2 else "snapshot")
                    for n in range(kind):
                        client.request(nbd.READ, n * 4096, 4096)
                        client.request(nbd.WRITE, n * 4096, 0, b"n" * 4096)
                    while client.pending and kind % 3:
                        client.reply()

    storms = [rig.run(storm, kind) for kind in range(6)]
    reads = disk.stats().guest_reads
    until(lambda: disk.stats().guest_reads > reads + 20 * number, "some use")
    rig.run(server.close).result()
    for thread in storms:
        thread.result()
    assert server.connections == 0
