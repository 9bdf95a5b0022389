"""The flaws that other NBD servers had, one by one. Each test is the attack; afterwards the server serves as before.

The server of most is a process of its own, which must be alive afterwards and end well.
"""

import contextlib
import struct
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, assert_t0, pattern, until
from nbd_support import Disconnected

MIB = 1 << 20
HELLO = struct.pack(">I", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)


# ---- QEMU ----


@pytest.mark.parametrize("gap", [False, True], ids=["at-once", "in-pieces"])
def test_cve_2017_7539_data_that_nobody_expects_in_the_negotiation(process, gap):
    """qemu-nbd's I/O outside a coroutine met a socket that would block, or undue data, and asserted."""
    option = nbd.option_header(nbd.GO, 14) + nbd.info_payload("nosuch", 3)
    long = nbd.option_header(77, 50000) + bytes(50000)
    for first in (HELLO, HELLO + long, b"NBDMAGIC", option + b"undue", long, option * 40, b"\xff" * 9):
        client = process.connect()
        with contextlib.suppress(Disconnected):
            client.send(first if gap else first + HELLO)
            client.recv(18)
            client.send(HELLO if gap else b"")
        client.sock.shutdown(1)
        client.dropped()


def test_cve_2017_9524_clients_that_leave_before_they_negotiate(process):
    """A port scan: qemu-nbd took down a client that it had not wholly set up, and crashed."""
    for number in range(200):
        client = process.connect()
        if number % 2:
            client.recv(number % 19)
        if number % 3 == 0:
            client.send(HELLO[: number % 5])
        client.sock.close()


@pytest.mark.parametrize("length", [256, 257, 3000, 4095, 4096])
@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO, nbd.EXPORT_NAME, nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_cve_2017_15118_export_names_of_up_to_4096_bytes(host, opt, length):
    """QEMU's buffer for a name had 256 bytes, on the stack."""
    disk = host.disk()
    client = host.hello()
    if opt == nbd.EXPORT_NAME:
        with pytest.raises(Disconnected):
            client.export_name("a" * length)
    else:
        client.option(nbd.STRUCTURED_REPLY)
        payload = nbd.info_payload if opt in (nbd.INFO, nbd.GO) else nbd.meta_payload
        assert client.option(opt, payload("a" * length)).error == nbd.ERR_UNKNOWN
        assert client.go("disk").error == 0
    assert host.open().read(0, disk.size) == disk.t0


def test_cve_2017_15119_options_of_four_gib(host):
    """QEMU read them to their end, and served nobody meanwhile. Here one byte of it need not be sent."""
    disk = host.disk()
    guest = host.open()
    clients = [host.hello() for _ in range(10)]
    for opt, client in enumerate(clients):
        client.send_option(opt, bytes(1000), length=2**32 - 1)
    assert guest.read(0, disk.size) == disk.t0
    assert [client.dropped() for client in clients] == [b""] * 10
    host.ended(connections=1)


@pytest.mark.parametrize("name", ["n" * 4096, "\N{SNOWMAN}" * 1365, "%s%n" * 1024, "'\\\"" * 1365])
@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO, nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_cve_2020_10761_error_texts_about_the_longest_names(host, opt, name):
    """QEMU's message about the name was longer than a string may be, which it asserted. The raw client checks that."""
    host.disk()
    client = host.hello()
    client.option(nbd.STRUCTURED_REPLY)
    payload = nbd.info_payload(name) if opt in (nbd.INFO, nbd.GO) else nbd.meta_payload(name, "base:" + "q" * 4091)
    reply = client.option(opt, payload)
    assert reply.error == nbd.ERR_UNKNOWN
    assert len(reply.text.encode()) <= 4096
    assert client.go("disk").error == 0


def test_cve_2024_7409_the_server_stops_while_clients_do_not_negotiate(host, rig):
    """QEMU crashed on nbd-server-stop while a client kept a socket open, or waited for that client."""
    host.disk()
    clients = [host.connect(), host.hello(), host.hello(), host.open(), host.open()]
    clients[2].send_option(nbd.GO, b"abc", length=1000)
    clients[4].send(nbd.header(nbd.WRITE, 0, 3 * CLUSTER) + b"n" * 1000)
    until(lambda: host.server.connections == 5, "all of them")
    rig.run(host.server.close).result()
    for client in clients:
        client.dropped()


def test_cve_2024_7409_clients_that_never_negotiate_keep_nobody_out_for_long(host):
    """Its other half: more of them than may negotiate at once."""
    server = host.serve(negotiating=4, handshake_seconds=0.2)
    disk = host.disk(server=server)
    idle = [host.connect(server) for _ in range(12)]
    assert host.open(server=server).read(0, 512) == disk.t0[:512]
    for client in idle:
        client.dropped()


# ---- nbd-server ----


@pytest.mark.parametrize("how", ["closes", "asks for nothing there", "resets"])
def test_cve_2013_7441_a_failed_negotiation_ends_that_connection_alone(process, how):
    """The parent, not the child, of nbd-server exited, where a client closed or named an export that is not there."""
    for _ in range(20):
        client = process.connect().hello()
        if how == "closes":
            client.sock.close()
        elif how == "resets":
            client.send_option(nbd.LIST, b"", length=10)
            client.sock.close()  # with the greeting's answer unread
        else:
            with pytest.raises(Disconnected):
                client.export_name("nosuch")


def test_cve_2015_0847_signals_while_connections_come_and_go(run_python, make_image, place):
    """nbd-server's handlers did what is not safe in one, and deadlocked. Here each call of the server is interrupted at
    any moment, by a handler that takes time, and the end comes by a signal, too."""
    code = """
import os, signal, socket, sys, threading, time
import cbwcore, nbd_protocol as nbd
from cbwcore.nbd import NbdServer
from nbd_support import Client

def come_and_go(path):
    for number in range(150):
        client = Client(path).hello()
        client.option(nbd.STRUCTURED_REPLY)
        if number % 3:
            client.go("disk")
            client.read(0, 4096)
            client.ok(nbd.WRITE, 0, 0, b"n" * 4096)
        client.sock.close()

def pester(stop):
    while not stop.is_set():
        for number in (signal.SIGUSR1, signal.SIGCHLD):
            os.kill(os.getpid(), number)
        time.sleep(0.0005)

class Stop(Exception):
    pass

def stop(*args):
    raise Stop

caught = []
for number in (signal.SIGUSR1, signal.SIGCHLD):
    signal.signal(number, lambda *args: caught.append(args))
signal.signal(signal.SIGTERM, stop)
with cbwcore.Disk(sys.argv[1]) as disk, disk.snapshot() as snapshot, NbdServer(socket=sys.argv[2]) as server:
    server.add_export("disk", disk, writable=True)
    guests = [threading.Thread(target=come_and_go, args=[sys.argv[2]]) for _ in range(3)]
    over = threading.Event()
    pest = threading.Thread(target=pester, args=[over])
    for thread in (pest, *guests):
        thread.start()
    for thread in guests:
        thread.join()
    idle = [Client(sys.argv[2]) for _ in range(3)]
    over.set()
    pest.join()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except Stop:
        pass
    assert snapshot.stats().cbw_copies == 1
    for client in idle:
        client.sock.close()
assert len(caught) > 10
print("ended")
"""
    import nbd_support

    image = make_image(4 * CLUSTER)
    code = f"import sys; sys.path.insert(0, {str(nbd_support.__file__.rpartition('/')[0])!r})\n" + code
    done = run_python(code, image, place / "s", timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


@pytest.mark.parametrize("length", [2**32 - 1, 2**32 - 4, 2**31, 1024 + 1])
@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO, nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_cve_2022_26495_a_name_whose_length_overflows(process, opt, length):
    """nbd-server allocated length + 1 bytes, which is 0, and read 2^32 - 1 bytes to there."""
    client = process.connect().hello()
    client.option(nbd.STRUCTURED_REPLY)
    payload = struct.pack(">I", length) + b"A" * 1020
    assert client.option(opt, payload).error in (nbd.ERR_INVALID, nbd.ERR_TOO_BIG)
    assert client.go("disk").error == 0
    assert client.read(0, 512) == pattern(MIB)[:512]


def test_cve_2022_26495_an_export_name_whose_length_overflows(process):
    client = process.connect().hello()
    client.send_option(nbd.EXPORT_NAME, b"B" * 4096, length=2**32 - 1)
    assert client.dropped() == b""


@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO])
@pytest.mark.parametrize("name", [0, 4, 4096])
@pytest.mark.parametrize("total", [1036, 5000, 60000])
def test_cve_2022_26496_an_option_that_is_longer_than_its_name(process, opt, name, total):
    """nbd-server read all the rest of the option into 1024 bytes of stack."""
    client = process.connect().hello()
    payload = (struct.pack(">I", name) + b"A" * total)[:total]
    reply = client.option(opt, payload)
    assert reply.error in (nbd.ERR_INVALID, nbd.ERR_UNKNOWN, nbd.ERR_TOO_BIG)
    assert client.option(0xDEADBEEF).error == nbd.ERR_UNSUP
    assert client.go("disk").error == 0


# ---- nbdkit ----


def test_cve_2019_14850_nothing_is_opened_for_a_client_that_only_negotiates(host, rig):
    """nbdkit opened its back end at once, so that a cheap connection cost a dear one behind it."""
    disk = host.disk()
    snap = host.snapshot(disk)
    plans = [rig.plan(disk), rig.plan(snap)]
    threads = threading.active_count()
    for number in range(20):
        client = host.hello()
        client.option(nbd.STRUCTURED_REPLY)
        client.option(nbd.LIST)
        client.info("disk", nbd.INFO_BLOCK_SIZE)
        client.meta(nbd.SET_META_CONTEXT, "snapshot", "base:allocation")
        if number % 2:
            client.option(nbd.ABORT)
        client.sock.close()
    host.ended()
    assert [plan.calls() for plan in plans] == [[], []]
    until(lambda: threading.active_count() <= threads, "the end of their threads")


ORDERS = {
    "GO after INFO": [(nbd.INFO, "disk"), (nbd.GO, "disk")],
    "GO after INFO of another": [(nbd.INFO, "snapshot"), (nbd.GO, "disk")],
    "GO after INFO of nothing": [(nbd.INFO, "nosuch"), (nbd.GO, "disk")],
    "GO after two INFO": [(nbd.INFO, "disk"), (nbd.INFO, "disk"), (nbd.GO, "disk")],
    "GO after a failed GO": [(nbd.GO, "nosuch"), (nbd.GO, "nosuch"), (nbd.GO, "disk")],
    "EXPORT_NAME after INFO": [(nbd.INFO, "snapshot"), (nbd.EXPORT_NAME, "disk")],
    "EXPORT_NAME after a failed GO": [(nbd.GO, "nosuch"), (nbd.EXPORT_NAME, "disk")],
    "GO after contexts after INFO": [(nbd.INFO, "disk"), (nbd.SET_META_CONTEXT, "disk"), (nbd.GO, "disk")],
    "GO after contexts of another": [(nbd.SET_META_CONTEXT, "snapshot"), (nbd.INFO, "disk"), (nbd.GO, "disk")],
    "INFO, then leave": [(nbd.INFO, "disk"), (nbd.ABORT, "")],
    "INFO of nothing, then leave": [(nbd.INFO, "nosuch"), (nbd.ABORT, "")],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("structured", [False, True])
def test_cve_2019_14851_options_in_an_order_that_nobody_thought_of(process, order, structured):
    """nbdkit's fix of the flaw before made it assert that INFO came once, and was followed by GO."""
    client = process.connect().hello()
    if structured:
        client.option(nbd.STRUCTURED_REPLY)
    for opt, name in order:
        if opt == nbd.EXPORT_NAME:
            client.export_name(name)
        elif opt == nbd.SET_META_CONTEXT:
            client.meta(opt, name, "base:allocation")
        else:
            client.option(opt, nbd.info_payload(name) if opt != nbd.ABORT else b"")
    if order[-1][0] == nbd.ABORT:
        assert client.dropped() == b""
    else:
        assert client.read(0, MIB) == pattern(MIB)


def test_cve_2021_3716_what_was_negotiated_in_the_clear_is_forgotten(tls_host, tls_client):
    """Somebody between client and server asks for structured replies before STARTTLS; nbdkit kept them, and the client
    met replies that it did not know."""
    host, server = tls_host(required=False)
    client = host.hello(server)
    assert client.option(nbd.STRUCTURED_REPLY).error == 0
    assert client.meta(nbd.SET_META_CONTEXT, "disk", "base:allocation").error == 0
    client.starttls(tls_client)
    assert client.meta(nbd.SET_META_CONTEXT, "disk", "base:allocation").error == nbd.ERR_INVALID
    assert client.go("disk").error == 0
    assert not client.flags & nbd.SEND_DF
    assert len(client.read(0, 4096)) == 4096  # the raw client sees a chunk where none may be
    assert client.call(nbd.READ, 5 * CLUSTER, 1).error == nbd.EINVAL
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL


@pytest.mark.parametrize("required", [True, False])
def test_cve_2021_3716_what_is_sent_in_the_clear_behind_starttls_is_no_option(tls_host, tls_client, required):
    """Injected into the same packet: a server that buffers takes it for the first option of the session."""
    host, server = tls_host(required=required)
    client = host.hello(server)
    go = nbd.info_payload("disk")
    client.send(
        nbd.option_header(nbd.STARTTLS)
        + nbd.option_header(nbd.STRUCTURED_REPLY)
        + nbd.option_header(nbd.GO, len(go))
        + go
        + nbd.header(nbd.WRITE, 0, 512)
        + b"n" * 512
    )
    assert client.option_reply(nbd.STARTTLS).error == 0
    assert struct.pack(">Q", nbd.REPLY_MAGIC) not in client.dropped()
    host.ended(server)
    assert_t0(host.rig.disks[0], host.rig.disks[0].t0)


LENGTHS = [2**32 - 1, 2**32 - 2, 2**32 - 511, 2**32 - 512, 2**32 - 4096, 2**32 - CLUSTER, 2**31, 2**31 + 1]


@pytest.mark.parametrize("kind", ["disk", "snapshot"])
@pytest.mark.parametrize("length", LENGTHS)
def test_cve_2025_47711_a_status_of_up_to_four_gib_from_one_larger_extent(host, rig, kind, length):
    """nbdkit compared with 2^32 where 2^32 - 1 is the most: an extent of the back end that is larger failed an
    assertion. Here it is one of 9 TiB."""
    disk = rig.sparse(9 << 40)
    host.server.add_export("disk", disk, writable=True)
    host.snapshot(disk)
    client = host.open(kind, contexts=["base:allocation"])
    for offset in (0, 1, 511, 2**32 - 1, 2**32, disk.size - length):
        for flags in (0, nbd.REQ_ONE):
            (extents,) = client.ok(nbd.BLOCK_STATUS, offset, length, flags=flags).status.values()
            assert extents == [(length, 3)]


@pytest.mark.parametrize("cluster", [4096, CLUSTER, MIB])
@pytest.mark.parametrize("offset", [0, 1, 4095, CLUSTER - 1, CLUSTER + 1])
def test_cve_2025_47712_a_status_whose_rounding_overflows_32_bits(host, rig, cluster, offset):
    """nbdkit's blocksize filter rounded offset and length outward, past 2^32, in 32 bits: a length of 0, and an
    assertion. Snapshots and bitmaps round to their clusters, too."""
    disk = rig.sparse(9 << 30)
    disk.pwrite(b"d" * cluster, 4 << 30)
    disk.bitmaps.add("b", granularity=cluster).set_range(4 << 30, 1)
    host.snapshot(disk, cluster_size=cluster, bitmaps=["b"])
    client = host.open("snapshot", contexts=["base:allocation", "qemu:dirty-bitmap:b"])
    for length in LENGTHS:
        reply = client.ok(nbd.BLOCK_STATUS, offset, length)
        for context, extents in reply.status.items():
            assert sum(n for n, _ in extents) == length
            if offset + length <= 4 << 30:
                assert extents == [(length, 3 if client.contexts[context] == "base:allocation" else 0)]


def test_all_of_them_at_once_end_in_time(process):
    """What one attack leaves behind must not make another one work."""
    started = time.monotonic()
    clients = [process.connect() for _ in range(12)]
    for number, client in enumerate(clients):
        client.hello()
        client.send_option(number, struct.pack(">I", 2**32 - 1) + b"A" * 1000)
    for client in clients:
        client.sock.close()
    assert time.monotonic() - started < LIMIT
