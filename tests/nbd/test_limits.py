"""The limits of the server, each at its edge: what is still served, what is refused, what costs the connection."""

import contextlib
import itertools
import struct
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, file_bytes, pattern, settled
from nbd_support import Disconnected

import cbwcore
from cbwcore import ConfigError
from cbwcore.nbd import NbdLimits, TlsConfig

MIB = 1 << 20
STALL = 0.2  # seconds


def limited(host, content=4 * CLUSTER, **limits):
    """A server with these limits that exports `disk`; both."""
    server = host.serve(**limits)
    return server, host.disk(content, server=server)


def goes_on(step, until=5.0):
    """Repeat a client's step until the server drops it, which must be soon."""
    started = time.monotonic()
    with contextlib.suppress(Disconnected):
        while time.monotonic() < started + until:
            step()
        pytest.fail(f"not dropped in {until} s")


def drip(client):
    client.send(b"x")
    time.sleep(0.001)


def lives(host, server, disk):
    """A new client is served."""
    client = host.open(server=server)
    assert client.read(0, 512) == disk.pread(512, 0)
    client.disconnect()


# ---- connections ----


def test_one_connection_more_than_allowed_is_closed_and_the_others_go_on(host):
    server, disk = limited(host, connections=2)
    first, second = host.open(server=server), host.open(server=server)
    assert host.connect(server).dropped() in (b"", b"NBDMAGICIHAVEOPT\0\3")
    assert first.read(0, 9) == second.read(0, 9) == disk.t0[:9]
    first.disconnect()
    host.ended(server, 1)
    lives(host, server, disk)


def test_clients_that_only_connect_take_places_too_and_give_them_back(host):
    server, disk = limited(host, connections=2, negotiating=2)
    idle = [host.connect(server), host.connect(server)]
    for client in idle:
        client.recv(18)
    idle[0].sock.close()
    host.ended(server, 1)
    lives(host, server, disk)


def test_no_more_than_so_many_negotiate_and_the_next_is_served_after_them(host):
    server, disk = limited(host, negotiating=2)
    idle = [host.hello(server), host.hello(server)]
    late = host.connect(server, timeout=0.1)
    with pytest.raises(TimeoutError):
        late.recv(1)  # it waits for its turn
    idle[0].sock.close()
    late.timeout = LIMIT
    late.recv(18)
    late.send(struct.pack(">I", nbd.FIXED_NEWSTYLE))
    assert late.go("disk").error == 0
    assert late.read(0, 9) == disk.t0[:9]
    lives(host, server, disk)
    assert idle[1].go("disk").error == 0


def test_clients_in_transmission_do_not_count_as_negotiating(host):
    server, disk = limited(host, negotiating=1)
    served = [host.open(server=server) for _ in range(5)]
    assert server.connections == 5
    assert [client.read(0, 9) for client in served] == [disk.t0[:9]] * 5


# ---- deadlines ----


@pytest.mark.parametrize("step", ["nothing", "hello", "half an option", "structured"])
def test_a_handshake_that_stops_is_ended_by_its_deadline(host, step):
    server, disk = limited(host, handshake_seconds=STALL)
    client = host.connect(server)
    if step != "nothing":
        client.hello()
    if step == "half an option":
        client.send_option(nbd.GO, b"\0\0\0\4di", length=10)
    if step == "structured":
        client.option(nbd.STRUCTURED_REPLY)
    started = time.monotonic()
    client.dropped()
    assert time.monotonic() - started < 5
    host.ended(server)
    lives(host, server, disk)


def test_a_handshake_that_goes_on_for_ever_is_ended_by_its_deadline(host):
    server, disk = limited(host, handshake_seconds=STALL, options=65536)
    client = host.hello(server)
    goes_on(lambda: client.option(nbd.LIST))
    lives(host, server, disk)


def test_an_option_that_comes_in_drops_is_ended_by_the_deadline(host):
    server, disk = limited(host, handshake_seconds=STALL)
    client = host.hello(server)
    client.send(nbd.option_header(99, 60000))
    goes_on(lambda: drip(client))
    lives(host, server, disk)


def test_replies_that_nobody_reads_are_ended_by_the_deadline(host):
    server, disk = limited(host, handshake_seconds=STALL, options=65536)
    for number in range(50):
        server.add_export(f"export{number}", disk, description="d" * 4096)
    client = host.hello(server)
    goes_on(lambda: client.send_option(nbd.LIST))
    host.ended(server)
    lives(host, server, disk)


def test_the_deadline_of_the_handshake_is_not_the_transmissions(host):
    server, disk = limited(host, handshake_seconds=STALL)
    client = host.open(server=server)
    host.hello(server).dropped()  # another came later, and its time is up
    assert client.read(0, 9) == disk.t0[:9]


HALF = {
    "one byte of a header": nbd.header(nbd.READ, 0, 512)[:1],
    "27 bytes of a header": nbd.header(nbd.READ, 0, 512)[:27],
    "a header without its payload": nbd.header(nbd.WRITE, 0, 512),
    "half a payload": nbd.header(nbd.WRITE, 0, 512) + b"n" * 511,
    "half a large payload": nbd.header(nbd.WRITE, 0, 3 * CLUSTER) + b"n" * (2 * CLUSTER),
    "half a payload that is drained": nbd.header(nbd.WRITE, 4 * CLUSTER, 3 * CLUSTER) + b"n" * 100,
    "a header after a whole request": nbd.header(nbd.FLUSH) + nbd.header(nbd.WRITE, 0, 512)[:13],
    "a payload after a whole request": nbd.header(nbd.FLUSH) + nbd.header(nbd.WRITE, 0, 512),
}


@pytest.mark.parametrize("half", HALF.values(), ids=HALF)
def test_a_request_that_stops_half_way_is_dropped_and_nothing_is_done(host, structured, half):
    server, disk = limited(host, stall_seconds=STALL)
    snap = host.snapshot(disk, server=server)
    client = host.open(server=server, structured=structured)
    client.send(half)
    started = time.monotonic()
    client.dropped()
    assert STALL / 2 < time.monotonic() - started < 5
    host.ended(server)
    assert file_bytes(disk.path) == disk.t0
    assert snap.stats().cbw_copies == 0
    lives(host, server, disk)


def test_a_payload_that_comes_in_drops_is_dropped(host):
    """A byte now and then is no progress: it would hold memory for ever."""
    server, disk = limited(host, stall_seconds=STALL)
    client = host.open(server=server)
    client.send(nbd.header(nbd.WRITE, 0, 4 * CLUSTER))
    goes_on(lambda: drip(client))
    assert file_bytes(disk.path) == disk.t0


def test_between_requests_a_client_may_be_idle_for_ever(host):
    server, disk = limited(host, stall_seconds=STALL)
    idle, used = host.open(server=server), host.open(server=server)
    used.ok(nbd.FLUSH)
    stalled = host.open(server=server)
    stalled.send(b"\x25")
    stalled.dropped()  # later than they were idle
    assert idle.read(0, 9) == used.read(0, 9) == disk.t0[:9]


def test_a_client_that_never_reads_its_replies_is_dropped(host, structured):
    server, disk = limited(host, pattern(MIB), stall_seconds=STALL)
    client = host.open(server=server, structured=structured)
    client.send(b"".join(nbd.header(nbd.READ, 0, MIB, handle=n) for n in range(64)))
    host.ended(server)
    lives(host, server, disk)


def test_a_client_that_never_reads_small_replies_is_dropped(host, structured):
    server, disk = limited(host, stall_seconds=STALL)
    client = host.open(server=server, structured=structured)
    requests = b"".join(nbd.header(nbd.READ, 0, 4096) for _ in range(1000))
    goes_on(lambda: client.send(requests))
    host.ended(server)
    lives(host, server, disk)


def test_a_client_that_reads_slowly_gets_all_of_it(host, structured):
    """Steady progress is no stall, however long the reply takes."""
    stall, count = 0.5, 24
    server, _ = limited(host, pattern(MIB), stall_seconds=stall)
    client = host.open(server=server, structured=structured)
    for number in range(count):
        client.request(nbd.READ, number, MIB - number)
    left, started = sum((28 if structured else 16) + MIB - n for n in range(count)), time.monotonic()
    while time.monotonic() < started + 2.2 * stall:
        left -= len(client.recv(min(left, 131072)))
        time.sleep(0.01)
    assert len(client.recv(left)) == left
    assert server.connections == 1


# ---- the same under TLS ----


def tls_limited(host, certificates, content=4 * CLUSTER, **limits):
    server = host.serve(tls=TlsConfig(certificates, required=True), **limits)
    return server, host.disk(content, server=server)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x40\x00\x01"])
def test_a_tls_handshake_that_stops_is_ended_by_the_deadline(host, certificates, sent):
    server, _ = tls_limited(host, certificates, handshake_seconds=STALL)
    client = host.hello(server)
    assert client.option(nbd.STARTTLS).error == 0
    client.send(sent)
    started = time.monotonic()
    client.dropped()
    assert time.monotonic() - started < 5
    host.ended(server)


def test_a_payload_that_stops_under_tls_is_dropped_and_nothing_is_done(host, certificates, tls_client):
    server, disk = tls_limited(host, certificates, stall_seconds=STALL)
    for part in (13, 28, 1000, 2 * CLUSTER):
        client = host.hello(server).starttls(tls_client)
        assert client.go("disk").error == 0
        client.send((nbd.header(nbd.WRITE, 0, 3 * CLUSTER) + b"n" * (3 * CLUSTER))[:part])
        started = time.monotonic()
        client.dropped()
        assert time.monotonic() - started < 5
    host.ended(server)
    assert file_bytes(disk.path) == disk.t0


def test_a_client_that_never_reads_under_tls_is_dropped(host, certificates, tls_client):
    server, _ = tls_limited(host, certificates, pattern(MIB), stall_seconds=STALL)
    client = host.hello(server).starttls(tls_client)
    assert client.go("disk").error == 0
    client.send(b"".join(nbd.header(nbd.READ, 0, MIB, handle=n) for n in range(64)))
    host.ended(server)


def test_between_requests_a_client_may_be_idle_under_tls(host, certificates, tls_client):
    server, disk = tls_limited(host, certificates, stall_seconds=STALL)
    idle, stalled = [host.hello(server).starttls(tls_client) for _ in range(2)]
    assert idle.go("disk").error == stalled.go("disk").error == 0
    assert idle.read(0, 9) == disk.t0[:9]
    stalled.send(b"\x25")
    stalled.dropped()
    assert idle.read(0, 9) == disk.t0[:9]


# ---- options ----


def test_so_many_options_and_no_more(host):
    server, _ = limited(host, options=5)
    client = host.hello(server)
    for _ in range(5):
        assert client.option(99).error == nbd.ERR_UNSUP
    client.send_option(nbd.LIST)
    assert client.dropped() == b""


def test_the_last_option_that_is_allowed_may_be_go(host):
    server, disk = limited(host, options=5)
    client = host.hello(server)
    for _ in range(4):
        client.option(nbd.LIST)
    assert client.go("disk").error == 0
    assert client.read(0, 9) == disk.t0[:9]


def test_an_option_above_its_limit_is_too_big_and_one_above_drain_drops_the_client(host):
    server, disk = limited(host, option_bytes=100, request=65536, drain=70000)
    client = host.hello(server)
    assert client.info("x" * 94).error == nbd.ERR_UNKNOWN
    assert client.info("x" * 95).error == nbd.ERR_TOO_BIG
    assert client.option(nbd.GO, bytes(70000)).error == nbd.ERR_TOO_BIG
    assert client.option(nbd.LIST, bytes(101)).error in (nbd.ERR_TOO_BIG, nbd.ERR_INVALID)
    assert client.option(99, bytes(70000)).error in (nbd.ERR_TOO_BIG, nbd.ERR_UNSUP)
    assert client.go("disk").error == 0
    assert client.read(0, 9) == disk.t0[:9]
    client = host.hello(server)
    client.send_option(nbd.INFO, b"", length=70001)
    assert client.dropped() == b""


@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO, nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
@pytest.mark.parametrize(("limit", "options"), [(4096, {}), (10, {"string_bytes": 10})])
def test_a_string_above_its_limit_is_refused(host, opt, limit, options):
    server, disk = limited(host, **options)
    client = host.hello(server)
    client.option(nbd.STRUCTURED_REPLY)
    payload = nbd.info_payload if opt in (nbd.INFO, nbd.GO) else nbd.meta_payload
    assert client.option(opt, payload("n" * limit)).error == nbd.ERR_UNKNOWN
    assert client.option(opt, payload("n" * (limit + 1))).error in (nbd.ERR_TOO_BIG, nbd.ERR_INVALID)
    if opt in (nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT):
        assert client.option(opt, payload("disk", "x:" + "q" * (limit - 2))).error == 0
        assert client.option(opt, payload("disk", "x:" + "q" * (limit - 1))).error in (nbd.ERR_TOO_BIG, nbd.ERR_INVALID)
    assert client.go("disk").error == 0
    assert client.read(0, 9) == disk.t0[:9]


@pytest.mark.parametrize("opt", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
@pytest.mark.parametrize(("limit", "options"), [(64, {}), (3, {"queries": 3})])
def test_so_many_queries_and_no_more(host, opt, limit, options):
    server, _ = limited(host, **options)
    client = host.hello(server)
    client.option(nbd.STRUCTURED_REPLY)
    assert client.meta(opt, "disk", *["base:allocation"] * limit).names == ["base:allocation"]
    reply = client.meta(opt, "disk", *["base:allocation"] * (limit + 1))
    assert (reply.error, reply.names) == (nbd.ERR_TOO_BIG, [])


def test_every_query_that_is_allowed_may_select_a_context(host):
    """The core has room for so many, and more queries cannot be allowed."""
    server = host.serve()
    names = [f"b{n}" for n in range(70)]
    bitmaps = [cbwcore.DirtyBitmap(4 * CLUSTER, name=name) for name in names]
    disk = host.disk(server=server, bitmaps=bitmaps)
    contexts = ["base:allocation", *(f"qemu:dirty-bitmap:{name}" for name in names)][:64]
    client = host.open(server=server, contexts=contexts)
    assert len(client.ok(nbd.BLOCK_STATUS, 0, disk.size).status) == 64
    assert NbdLimits(queries=64).queries == 64
    for too_many in (65, 66, 65536):
        with pytest.raises(ConfigError, match=f"queries {too_many} is no number in 1..64"):
            NbdLimits(queries=too_many)


# ---- requests ----


def test_the_largest_request_is_advertised_and_enforced(host, structured):
    server, disk = limited(host, request=65536, drain=100_000)
    client = host.hello(server)
    if structured:
        client.option(nbd.STRUCTURED_REPLY)
    assert client.go("disk", nbd.INFO_BLOCK_SIZE).info[nbd.INFO_BLOCK_SIZE] == (1, 4096, 65536)
    client.ok(nbd.WRITE, 0, 0, b"n" * 65536)
    assert client.read(0, 65536) == b"n" * 65536
    assert client.call(nbd.WRITE, 0, 0, b"m" * 65537).error == nbd.EINVAL
    assert client.call(nbd.WRITE, 0, 0, b"m" * 100_000).error == nbd.EINVAL
    assert client.call(nbd.READ, 0, 65537).error == nbd.EINVAL
    assert client.read(0, disk.size - 3 * CLUSTER) == b"n" * CLUSTER
    client.send(nbd.header(nbd.WRITE, 0, 100_001))
    assert client.dropped() == b""


def test_what_brings_no_data_may_be_larger_than_the_largest_request(host):
    server, disk = limited(host, request=65536)
    client = host.open(server=server, contexts=["base:allocation"])
    for cmd in (nbd.CACHE, nbd.WRITE_ZEROES, nbd.TRIM, nbd.BLOCK_STATUS):
        client.ok(cmd, 0, disk.size)


# ---- bytes in flight ----


def begun(clients):
    """Clients in the transmission phase, on the server's side, too."""
    clients = list(clients)
    for client in clients:
        client.read(0, 1)
    return clients


def accepted(**limits):
    try:
        return NbdLimits(**limits)
    except ConfigError:
        return None


@pytest.mark.parametrize("request_", [65536, 100_000, MIB, 33 * MIB])
def test_the_least_limits_that_are_accepted_can_serve(host, request_):
    """Whoever allows requests of that size, and the fewest bytes in flight that may be, has them served."""
    limits = {"request": request_, "drain": 64 * MIB, "connections": 1}
    least = next(n for n in itertools.count(request_, 4096) if accepted(bytes_in_flight=n, **limits))
    server, disk = limited(host, 34 * MIB, bytes_in_flight=least, **limits)
    client = host.open(server=server)
    assert client.read(0, request_) == disk.t0[:request_]
    client.ok(nbd.WRITE, 0, 0, b"n" * request_)


def test_requests_beyond_the_bytes_in_flight_wait_their_turn(host, rig, structured):
    """Eight clients ask for four times the budget, and only then begin to read."""
    server, disk = limited(host, pattern(MIB), request=MIB, bytes_in_flight=16 * MIB)
    clients = begun(host.open(server=server, structured=structured) for _ in range(8))
    for client in clients:
        client.send(b"".join(client.expect(nbd.READ, n, MIB - n) for n in range(8)))

    def take(client):
        for _ in range(8):
            reply = client.reply()
            assert reply.error == 0
            assert reply.data == disk.t0[reply.offset :]

    for reader in [rig.run(take, client) for client in clients]:
        reader.result()


def test_payloads_beyond_the_bytes_in_flight_wait_their_turn(host, rig):
    server, disk = limited(host, 16 * MIB, request=MIB, bytes_in_flight=16 * MIB)
    guest, *clients = begun(host.open(server=server) for _ in range(17))
    for number, client in enumerate(clients):
        client.send(client.expect(nbd.WRITE, number * MIB, MIB) + bytes([number]) * 1000)
    guest.ok(nbd.WRITE, 0, 0, b"g" * 4096)  # a small request needs none of what they hold
    assert guest.read(0, 4096) == b"g" * 4096
    for number, client in enumerate(clients):
        rig.run(client.send, bytes([number]) * (MIB - 1000))
    for writer in rig.guests:
        writer.result()
    assert [client.reply().error for client in clients] == [0] * 16
    assert file_bytes(disk.path) == b"".join(bytes([n]) * MIB for n in range(16))


def test_a_new_client_is_served_though_others_hold_all_the_bytes_in_flight(host):
    """Their replies wait to be read, for as long as the server lets them."""
    server, disk = limited(host, pattern(MIB), request=MIB, bytes_in_flight=16 * MIB)
    greedy = begun(host.open(server=server) for _ in range(8))
    for client in greedy:
        client.send(b"".join(client.expect(nbd.READ, 0, MIB) for _ in range(16)))
    settled(lambda: [host.unread(client) for client in greedy])  # all of them have what they can get
    for _ in range(4):
        guest = host.open(server=server)
        guest.ok(nbd.WRITE, 0, 0, disk.t0[:4096])
        assert guest.read(0, 4096) == disk.t0[:4096]


def test_a_block_status_has_fewer_extents_when_memory_is_short(host, rig):
    """2^14, which a connection's own memory holds; when it is not short, all that there are."""
    server = host.serve(request=MIB, bytes_in_flight=4 * MIB)
    size = 512 << 15
    bitmap = cbwcore.DirtyBitmap(size, granularity=512, name="b")
    for start in range(0, size, 1024):
        bitmap.set_range(start, 512)
    host.disk(pattern(size), server=server, bitmaps=[bitmap])
    name = "qemu:dirty-bitmap:b"
    client = host.open(server=server, contexts=[name])
    greedy = begun(host.open(server=server) for _ in range(2))  # a third would wait for them, and they be dropped
    for each in greedy:
        each.send(each.expect(nbd.READ, 0, MIB))
    settled(lambda: [host.unread(each) for each in greedy])
    extents = [(512, 1), (512, 0)] * (1 << 14)
    (short,) = client.ok(nbd.BLOCK_STATUS, 0, size).status.values()
    assert short == extents[: 1 << 14]
    (rest,) = client.ok(nbd.BLOCK_STATUS, 512 << 14, size - (512 << 14)).status.values()
    assert rest == extents[: 1 << 14]
    for each in greedy:
        assert each.reply().error == 0
    (whole,) = client.ok(nbd.BLOCK_STATUS, 0, size).status.values()
    assert whole == extents


def memory(pid):
    """(resident, the most that was resident), in MiB."""
    with open(f"/proc/{pid}/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return tuple(int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))


def test_the_memory_of_the_server_stays_in_its_bounds(rig, server_process, make_image):
    """16 clients ask for 512 MiB in all and do not read it, 16 others stop in the middle of payloads."""
    image = make_image(16 * MIB)
    process = server_process(image, request=4 * MIB, bytes_in_flight=32 * MIB)
    clients = begun(process.open() for _ in range(32))
    before, _ = memory(process.pid)
    for client in clients[:16]:
        client.send(b"".join(client.expect(nbd.READ, 0, 4 * MIB) for _ in range(8)))
    for client in clients[16:]:
        client.send(client.expect(nbd.WRITE, 0, 4 * MIB) + b"n" * 1000)
    settled(lambda: memory(process.pid)[0])
    assert memory(process.pid)[1] - before < 32 + 24
    for client in clients[16:]:
        client.sock.close()
    for reader in [rig.run(lambda c=client: [c.reply().error for _ in range(8)]) for client in clients[:16]]:
        assert reader.result() == [0] * 8
    assert memory(process.pid)[1] - before < 32 + 24
    process.stop()
