"""relay(): from a TLS session to a socket pair and back."""

import contextlib
import os
import random
import select
import socket
import ssl
import time
import tracemalloc
from pathlib import Path

import pytest
from engine_support import LIMIT, Guest, settled, until
from handshake_support import MIB

from cbwcore.nbd import TlsConfig
from cbwcore.nbd.tls import _Flow, relay

PIECES = (1, 2, 100, 4124, 16384, 16385, 70000, 300000)


class Relay:
    """``client`` ══ TLS ══ relay ── socket pair ── ``loop``."""

    def __init__(self, tls, context, *, pipelined=b"", stall_seconds=LIMIT, version=None):
        self.raw, self.served = socket.socketpair()
        if version:
            context.minimum_version = context.maximum_version = version
        accepted = Guest(tls.accept, self.served, LIMIT)
        self.client = context.wrap_socket(self.raw.dup(), suppress_ragged_eofs=False)
        self.session = accepted.result()
        self.plain, self.loop = socket.socketpair()
        for sock in (self.client, self.loop):
            sock.settimeout(LIMIT)
        if pipelined:  # half of its record is read before the relay begins, as by a handshake
            self.client.sendall(pipelined)
            assert self.session.recv(len(pipelined) // 2) == pipelined[: len(pipelined) // 2]
        self.guest = Guest(relay, self.session, self.plain, stall_seconds)

    def close(self):
        for sock in (self.client, self.raw, self.loop, self.served):
            sock.close()
        self.guest.result()
        self.session.close()
        self.plain.close()


@pytest.fixture
def relayed(directory, as_client):
    """``relayed(...)``: a Relay; closed at the end, and it must end."""
    tls = TlsConfig(directory)
    with contextlib.ExitStack() as undo:

        def relayed(**options):
            made = Relay(tls, as_client(), **options)
            undo.callback(made.close)
            return made

        yield relayed


def exchange(sock, data, length, rng):
    """Send and receive at once, in one thread as TLS wants it, in pieces of random sizes."""
    sock.setblocking(False)
    blocked = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    poll = select.poll()
    view, piece, got = memoryview(data), None, bytearray()
    while view or len(got) < length:
        poll.register(sock, select.POLLIN | (select.POLLOUT if view else 0))
        pending = isinstance(sock, ssl.SSLSocket) and sock.pending()
        assert pending or poll.poll(LIMIT * 1000), f"{len(view)} bytes not taken, {length - len(got)} not there"
        with contextlib.suppress(*blocked):
            got += sock.recv(rng.choice(PIECES))
        piece = piece or view[: rng.choice(PIECES)]  # after it was blocked, TLS wants the same again
        with contextlib.suppress(*blocked):
            view, piece = view[sock.send(piece) if piece else 0 :], None
    return bytes(got)


def write(sock, data):
    sock.sendall(data)


def read(sock, length):
    data = bytearray()
    while len(data) < length:
        part = sock.recv(min(1 << 20, length - len(data)))
        if not part:
            break
        data += part
    return bytes(data)


def close_notify(session):
    """That alone: unwrap() would not let it read on. The socket may be full of what was sent before."""
    while True:
        try:
            session._sslobj.shutdown()
            return
        except ssl.SSLWantWriteError:
            poll = select.poll()
            poll.register(session, select.POLLOUT)
            assert poll.poll(LIMIT * 1000)


def end(sock):
    """The end of what ``sock`` sends."""
    if isinstance(sock, ssl.SSLSocket):
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            close_notify(sock)
        sock.settimeout(LIMIT)
    else:
        sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_much_data_both_ways_at_once(relayed, rng, in_threads, version):
    made = relayed(version=version)
    there, back = rng.randbytes(24 * MIB + 1), rng.randbytes(24 * MIB + 3)
    at_client, at_loop = in_threads(
        lambda: exchange(made.client, there, len(back), random.Random(1)),
        lambda: exchange(made.loop, back, len(there), random.Random(2)),
    )
    assert at_loop == there
    assert at_client == back
    assert not made.guest.done


def test_requests_and_replies_in_turn(relayed, rng):
    made = relayed()
    for size in (1, 28, 4096, 16384, 16385, 65536, 65537, 200000):
        data = rng.randbytes(size)
        got = Guest(read, made.loop, size)
        made.client.sendall(data)
        assert got.result() == data
        got = Guest(read, made.client, size)
        made.loop.sendall(data)
        assert got.result() == data


@pytest.mark.parametrize("size", [2, 1000, 16384])
def test_what_is_decrypted_already_is_not_waited_for(relayed, rng, size):
    pipelined = rng.randbytes(size)
    assert read(relayed(pipelined=pipelined).loop, size - size // 2) == pipelined[size // 2 :]


def test_a_record_for_which_there_was_no_room_is_not_waited_for(relayed, rng):
    """Its rest is decrypted already, and no event tells of it."""
    made = relayed()
    sent = b""
    while not (made.session.pending() and settled(made.session.pending)):
        assert len(sent) < 4 * MIB
        record = rng.randbytes(16000)  # 64 KiB end inside the fifth
        made.client.sendall(record)
        sent += record
        until(lambda: not select.select([made.served], [], [], 0)[0], "the relay takes a record")
    assert read(made.loop, len(sent)) == sent


def test_the_loop_ends_first_and_the_client_gets_all_of_it(relayed, rng):
    made = relayed()
    data = rng.randbytes(3 * MIB)
    sending = Guest(lambda: (write(made.loop, data), made.loop.close()))
    assert read(made.client, len(data)) == data
    assert made.client.recv(1) == b"", "with a close_notify: a cut connection would raise"
    sending.result()
    made.guest.result()


def test_the_loop_may_end_with_unread_requests(relayed):
    made = relayed()
    made.client.sendall(b"x" * 100)
    until(lambda: select.select([made.loop], [], [], 0)[0], "the request")
    made.loop.sendall(b"the last reply")
    made.loop.close()
    assert read(made.client, 14) == b"the last reply"
    assert made.client.recv(1) == b""
    made.guest.result()


def test_the_client_ends_first_and_gets_what_is_still_answered(relayed, rng):
    made = relayed()
    there, back = rng.randbytes(3 * MIB), rng.randbytes(3 * MIB)
    sending = Guest(lambda: (write(made.client, there), end(made.client)))
    assert read(made.loop, len(there) + 1) == there, "and then its end"
    sending.result()
    answering = Guest(lambda: (write(made.loop, back), made.loop.close()))
    assert read(made.client, len(back)) == back
    answering.result()
    made.guest.result()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_is_gone_is_the_end_for_the_loop(relayed, how):
    made = relayed()
    made.client.sendall(b"disconnect")
    if how == "reset":
        made.session.setblocking(False)
        made.raw.sendall(b"no TLS at all")
    else:
        made.client.close()
        made.raw.close()
    assert read(made.loop, 100) == b"disconnect"
    assert not made.guest.done, "the loop may still have something to finish"
    made.loop.close()
    made.guest.result()


def test_a_client_that_is_gone_while_the_loop_sends_ends_it(relayed):
    made = relayed()
    made.client.close()
    made.raw.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        write(made.loop, bytes(64 * MIB))
    made.guest.result()


def test_a_client_that_takes_nothing_is_dropped(relayed):
    """Also after the loop has given up: what the relay holds must not hold the relay."""
    made = relayed(stall_seconds=0.5)
    made.loop.settimeout(0.1)
    with pytest.raises(TimeoutError):
        write(made.loop, bytes(64 * MIB))
    before = time.monotonic()
    made.loop.close()
    made.guest.result()
    assert time.monotonic() - before < 3
    assert len(read(made.raw, 64 * MIB)) < 64 * MIB, "what the kernel holds, and then the end"


def test_a_client_that_takes_little_is_not_dropped(relayed):
    made = relayed(stall_seconds=1.0)
    data = bytes(8 * MIB)
    sending = Guest(lambda: (write(made.loop, data), made.loop.close()))
    length = 0
    for _ in range(8):
        length += len(read(made.client, 300000))
        time.sleep(0.2)
    assert length + len(read(made.client, len(data))) == len(data)
    sending.result()
    made.guest.result()


@pytest.mark.parametrize("side", ["client", "loop"])
@pytest.mark.parametrize("busy", [False, True])
def test_shutting_down_either_side_ends_it_at_once(relayed, side, busy):
    made = relayed()
    if busy:
        for sock in (made.client, made.loop):
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                write(sock, bytes(64 * MIB))
    before = time.monotonic()
    if side == "client":
        made.served.shutdown(socket.SHUT_RDWR)
        made.loop.shutdown(socket.SHUT_RDWR)  # the loop, at its end
    else:
        made.plain.shutdown(socket.SHUT_RDWR)
        if busy:
            made.served.shutdown(socket.SHUT_RDWR)  # or the client may still have what is there for it
    made.guest.result()
    assert time.monotonic() - before < 2


def test_nothing_passes_in_the_clear_when_the_session_is_shut_down(relayed):
    """SSLSocket.shutdown() takes the TLS away first, then shuts down; in between, recv() and send() are plain."""
    made = relayed()
    made.session._sslobj = None
    made.raw.sendall(b"a forged request")
    assert read(made.loop, 100) == b""
    made = relayed()
    made.session._sslobj = None
    made.loop.sendall(b"a reply")
    made.guest.result()
    assert read(made.raw, 100) == b""


def test_a_slow_client_is_a_stalled_one_only_without_progress(monkeypatch):
    class End:
        waits_for = 0

        def __init__(self, *counts):
            self.counts = list(counts)

        def __call__(self, view):
            return self.counts.pop(0)

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    flow = _Flow(End(1000, 1000, 0), End(None, None, 1, None, 1999))
    assert flow.seconds_left(30) is None
    assert flow.move()
    assert flow.seconds_left(30) == 30
    now = 110.0
    assert flow.move(), "more has come, but nothing is sent"
    assert flow.seconds_left(30) == 20
    now = 120.0
    assert flow.move(), "the end has come, and one byte is sent"
    assert flow.seconds_left(30) == 30
    now = 155.0
    assert not flow.move()
    assert flow.seconds_left(30) == -5
    assert not flow.over
    assert flow.move()
    assert flow.seconds_left(30) is None
    assert flow.over


@pytest.mark.parametrize("state", ["idle", "client blocked", "loop blocked", "client ended"])
def test_a_relay_that_waits_takes_no_cpu(relayed, state):
    made = relayed()
    if "blocked" in state:
        sock = made.loop if state == "client blocked" else made.client
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            write(sock, bytes(64 * MIB))
    elif state == "client ended":
        end(made.client)
        assert read(made.loop, 1) == b""
    used = cpu_seconds(made.guest)
    time.sleep(0.5)
    assert cpu_seconds(made.guest) - used < 0.05


def cpu_seconds(thread):
    fields = (Path("/proc/self/task") / str(thread.native_id) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_what_a_relay_holds_is_bounded(relayed):
    made = relayed()
    data = bytes(64 * MIB)
    tracemalloc.start()
    try:
        for sock in (made.client, made.loop):
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                write(sock, data)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
