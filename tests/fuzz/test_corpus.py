"""The fuzzers' corpora, replayed against the installed package in process: what the fuzzers reached, and what they
found, stays right without clang. run.sh is for finding more."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import nbd_protocol as nbd
import pytest
from engine_support import Guest
from fuzz import sessions
from fuzz.handshake import Server
from fuzz.record import make_disk
from nbd_support import Client, Disconnected

import cbwcore
from cbwcore._cbwcore import NbdConnectionCore, NbdCore

CORPUS = Path(__file__).with_name("corpus")
T0 = sessions.t0()
STALL = 0.05  # seconds


def inputs(name):
    """The files of a corpus."""
    files = sorted((CORPUS / name).iterdir())
    assert files
    return files


# ---- the handshake ----


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


def test_every_handshake_ends_as_it_must(server):
    ends = set()
    for path in inputs("handshake"):
        try:
            ends.add(server.check(path.read_bytes()))
        except AssertionError as e:
            pytest.fail(f"{path}: {e}")
    assert ends == {"served", "dropped", "left", "late", "tls", "vanished"}


# ---- transmission ----


class Rig:
    """A disk of patterns and holes, restored for each session."""

    def __init__(self, place):
        self.place = place
        make_disk(place / "disk")
        self.disk = cbwcore.Disk(place / "disk")
        self.bitmap = cbwcore.DirtyBitmap(sessions.SIZE, sessions.DIRTY, name="b")
        for block in filter(sessions.is_dirty, range(len(self.bitmap))):
            self.bitmap.set_range(block * sessions.DIRTY, 1)

    def close(self):
        self.disk.close()

    def restore(self):
        for at in range(0, sessions.SIZE, sessions.CLUSTER):
            content = T0[at : at + sessions.CLUSTER]
            if self.disk.pread(len(content), at) != content:
                self.disk.pwrite(content, at)

    @contextlib.contextmanager
    def source(self, session):
        """What is exported."""
        if session.kind in (sessions.SNAPSHOT, sessions.COPYING_DISK):
            with self.disk.snapshot(cluster_size=sessions.CLUSTER) as snapshot:
                yield snapshot if session.kind == sessions.SNAPSHOT else self.disk
                assert session.kind == sessions.SNAPSHOT or snapshot.pread(sessions.SIZE, 0) == T0
        else:
            yield self.disk

    def connect(self, session, source):
        """The core, and a connection to it."""
        core = NbdCore(
            connections=4,
            bytes_in_flight=(2 if session.tight else 64) << 20,
            max_request=sessions.MAX_REQUEST,
            max_drain=sessions.MAX_DRAIN,
            max_extents=session.extents,
            stall_seconds=STALL if session.leave == sessions.STALL else 30.0,
        )
        bitmaps = {sessions.BASE: None, sessions.BITMAP: self.bitmap}
        return core, NbdConnectionCore(
            core,
            source,
            read_only=session.kind == sessions.READ_ONLY_DISK,
            discard=session.discard,
            structured=session.structured,
            contexts=[bitmaps[name] for name in session.contexts],
        )


@pytest.fixture
def rig(place):
    made = Rig(place)
    yield made
    made.close()


class Peer:
    """The client of one session: sends in a thread, and judges what comes."""

    def __init__(self, session, sock):
        self.session = session
        self.sock = sock
        self.client = Client(sock)
        self.client.structured = session.structured
        self.client.contexts = dict(enumerate(session.contexts, 1))
        self.client.size = sessions.SIZE
        self.requests = {request.handle: request for request in session.requests if request.whole}
        for request in self.requests.values():
            self.client.expect(request.cmd, request.offset, request.length, flags=request.flags, handle=request.handle)

    def send(self, conn):
        """All of it, or up to the middle, where it leaves."""
        session, at = self.session, 0
        end = session.cut if session.leave in (sessions.VANISH, sessions.STOP) else len(session.wire)
        with contextlib.suppress(OSError):  # the server may have ended it
            while at < end:
                at += self.sock.send(session.wire[at : min(at + max(session.piece, end // 50), end)])
            if session.leave == sessions.STOP:
                conn.stop()
            elif not session.ragged or session.leave != sessions.STALL:
                self.sock.shutdown(socket.SHUT_WR if session.leave != sessions.VANISH else socket.SHUT_RDWR)

    def receive(self):
        """Every reply, to the end."""
        with contextlib.suppress(Disconnected):
            while True:
                reply = self.client.reply()
                self.check_error(reply)
                if reply.cmd == nbd.READ and not reply.error:
                    self.check_content(reply.data, reply.offset)

    def check_error(self, reply):
        """What depends on the export is judged by the fuzzer; this much holds for all."""
        read_only = self.session.kind in (sessions.READ_ONLY_DISK, sessions.SNAPSHOT)
        if reply.cmd in (nbd.WRITE, nbd.WRITE_ZEROES) and read_only:
            assert reply.error
        if reply.cmd != nbd.FLUSH and reply.offset + reply.length > sessions.SIZE:
            assert reply.error
        if not reply.error and reply.cmd == nbd.BLOCK_STATUS:
            for name, number in zip(self.session.contexts, sorted(reply.status), strict=True):
                self.check_status(reply, name, reply.status[number])

    def check_status(self, reply, name, extents):
        at = reply.offset
        for length, flags in extents:
            if name == sessions.BITMAP:
                blocks = range(at // sessions.DIRTY, (at + length - 1) // sessions.DIRTY + 1)
                assert {sessions.is_dirty(block) for block in blocks} == {bool(flags)}
            elif flags:
                self.check_content(bytes(length), at)
            at += length

    def check_content(self, data, offset):
        """Every byte is T0's, or one that a request may have put there."""
        if data == T0[offset : offset + len(data)]:
            return
        for at, byte in enumerate(data, offset):
            assert byte == T0[at] or self.may_be(at, byte), f"{byte} at {at}"

    def may_be(self, at, byte):
        return self.session.kind != sessions.SNAPSHOT and any(
            request.changes
            and request.offset <= at < request.offset + request.length
            and byte == (request.payload[at - request.offset] if request.cmd == nbd.WRITE else 0)
            for request in self.requests.values()
        )

    def check_end(self, end):
        allowed = {self.session.end} | {
            sessions.HALF_CLOSE: set(),
            sessions.VANISH: {"gone"},
            sessions.STOP: {"stopped"},
            sessions.STALL: {"stalled"},
        }[self.session.leave]
        assert end in allowed
        assert self.session.leave != sessions.HALF_CLOSE or not self.client.pending, "requests without a reply"


def serve(rig, session):
    """One session; AssertionError where the server does what it must not."""
    ours, theirs = socket.socketpair()
    with ours, theirs, rig.source(session) as source:
        if session.leave == sessions.STALL:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        core, conn = rig.connect(session, source)
        peer = Peer(session, ours)
        serving = Guest(conn.serve, theirs.fileno())
        sending = Guest(peer.send, conn)
        if session.leave != sessions.STALL:
            closing = Guest(lambda: (serving.join(), theirs.shutdown(socket.SHUT_RDWR)))
            peer.receive()
            closing.result()
        end = serving.result()
        ours.close()
        sending.result()
        peer.check_end(end)
        _, used, kept, reserved = core._buffers()
        assert (used, reserved) == (kept, 0), "bytes in flight are not given back"
        core._stop_helpers()
    content = rig.disk.pread(sessions.SIZE, 0)
    if session.kind in (sessions.READ_ONLY_DISK, sessions.SNAPSHOT):
        assert content == T0
    peer.check_content(content, 0)


def test_every_session_is_answered_as_it_must_be(rig):
    for path in inputs("transmission"):
        session = sessions.parse(path.read_bytes())
        if session is None:
            continue
        try:
            serve(rig, session)
        except (AssertionError, TimeoutError) as e:
            pytest.fail(f"{path}: {e!r}")
        rig.restore()
