"""The compiled NBD loop under load: guests with many requests in flight beside readers of the snapshot.

Each guest connection owns a slice of the disk and knows what every unit of it holds; each snapshot connection knows T0.
Requests in flight of one connection never overlap, so every reply can be judged whatever the order. Delays in the I/O
table make requests wait at random, so that the reader's part changes threads all the time. CBWCORE_SEED replays a run
as far as its requests go.
"""

import contextlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import settled
from nbd_support import Client as NbdClient

import cbwcore
from cbwcore._cbwcore import FaultPlan, NbdConnectionCore, NbdCore

UNIT = 4096
UNITS = 96  # of each guest's slice
GUESTS = 3
READERS = 2
WINDOW = 24
SECONDS = float(os.environ.get("CBWCORE_NBD_SECONDS") or 3)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA = 1


@pytest.fixture
def core():
    limits = {"bytes_in_flight": 8 << 20, "max_request": 1 << 20, "max_drain": 2 << 20, "max_extents": 64}
    made = NbdCore(connections=8, stall_seconds=20.0, **limits)
    yield made
    made._stop_helpers()


class Session:
    """A connection past its handshake, and the thread that serves it."""

    def __init__(self, core, source, *, kind=socket.SOCK_STREAM, **options):
        self.sock, self.theirs = socket.socketpair(type=kind)
        self.sock.settimeout(30)
        options = {"read_only": False, "discard": False, "structured": True, "contexts": (None,)} | options
        self.core = NbdConnectionCore(core, source, **options)
        self.ends = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        self.ends.append(self.core.serve(self.theirs.fileno()))
        self.theirs.close()

    def send(self, cmd, flags, handle, offset, length, payload=b""):
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, cmd, handle, offset, length) + payload)

    def receive(self, n):
        data = bytearray()
        while len(data) < n:
            part = self.sock.recv(n - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def reply(self):
        """(handle, errno, data or None) of the next whole reply."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            error, handle = struct.unpack(">IQ", self.receive(12))
            return handle, error, None
        assert magic == 0x668E33EF
        flags, kind, handle, length = struct.unpack(">HHQI", self.receive(16))
        body = self.receive(length)
        assert flags == 1
        if kind == 32769:
            return handle, struct.unpack(">I", body[:4])[0], None
        return handle, 0, body[8:] if kind == 1 else body

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive(), "serve() hangs"
        self.sock.close()
        return self.ends[0]


class Client(threading.Thread):
    """Keeps up to WINDOW requests in flight on units that none of the others touches."""

    def __init__(self, session, seed, first, units, known):
        super().__init__(daemon=True)
        self.session = session
        self.rng = random.Random(seed)
        self.first = first
        self.known = known  # bytes of each unit
        self.free = list(range(units))
        self.flying = {}
        self.handle = 0
        self.served = 0
        self.until = time.monotonic() + SECONDS
        self.error = None
        self.start()

    def run(self):
        try:
            while time.monotonic() < self.until or self.flying:
                self.turn()
            self.session.send(DISC, 0, 0, 0, 0)
        except BaseException as e:
            self.error = e

    def turn(self):
        goes_on = time.monotonic() < self.until
        while goes_on and self.free and len(self.flying) < self.rng.choice((1, 4, WINDOW)):
            self.submit()
        if self.flying:
            self.judge(*self.session.reply())

    def submit(self):
        unit = self.free.pop(self.rng.randrange(len(self.free)))
        cmd, flags, data = self.choose(unit)
        self.handle += 1
        self.flying[self.handle] = unit, cmd, data
        length = 0 if cmd == FLUSH else UNIT
        offset = 0 if cmd == FLUSH else (self.first + unit) * UNIT
        self.session.send(cmd, flags, self.handle, offset, length, data if cmd == WRITE else b"")

    def choose(self, unit):
        return READ, 0, None

    def judge(self, handle, error, data):
        unit, cmd, written = self.flying.pop(handle)
        self.free.append(unit)
        self.served += 1
        assert error == 0, (cmd, error)
        if cmd == READ:
            assert data == self.known[unit], f"unit {self.first + unit}"
        elif written is not None:
            self.known[unit] = written


class GuestClient(Client):
    def choose(self, unit):
        cmd = self.rng.choices((READ, WRITE, ZEROES, FLUSH, CACHE), (40, 50, 6, 2, 2))[0]
        if cmd == WRITE:
            return cmd, self.rng.choices((0, FUA), (20, 1))[0], self.rng.randbytes(16) * (UNIT // 16)
        return cmd, 0, bytes(UNIT) if cmd == ZEROES else None


class SnapshotClient(Client):
    def choose(self, unit):
        return self.rng.choice((READ, READ, STATUS)), 0, None

    def judge(self, handle, error, data):
        unit, cmd, _ = self.flying[handle]
        super().judge(handle, error, data)
        if cmd == STATUS:
            _, length, flags = struct.unpack(">III", data)
            assert length == UNIT
            assert not flags or not any(self.known[unit]), f"unit {self.first + unit} is called zero"


@pytest.mark.timeout(SECONDS * 4 + 200)
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_every_reply_is_right_while_readers_change(core, tmp_path, direct):
    seed = int(os.environ.get("CBWCORE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"replay with CBWCORE_SEED={seed}")
    rng = random.Random(seed)
    size = GUESTS * UNITS * UNIT
    t0 = b"".join(rng.randbytes(UNIT) if rng.random() < 0.8 else bytes(UNIT) for _ in range(GUESTS * UNITS))
    path = tmp_path / "disk"
    path.write_bytes(t0)
    known = [t0[i : i + UNIT] for i in range(0, size, UNIT)]
    plan, target_plan = FaultPlan(), FaultPlan()
    with (
        cbwcore.Disk(path, direct=direct) as disk,
        disk.snapshot(tmp_path / "target", cluster_size=UNIT * 2) as snapshot,
    ):
        disk._inject(plan)
        snapshot._inject(target_plan)
        for op in ("pread", "pwrite", "flush"):
            for skip in range(5):
                plan.delay(op, 0.002, skip=rng.randrange(400) * (skip + 1), times=rng.randrange(1, 40))
        target_plan.delay("pwrite", 0.003, skip=10, times=60)
        guests = [
            GuestClient(Session(core, disk), rng.random(), i * UNITS, UNITS, known[i * UNITS : (i + 1) * UNITS])
            for i in range(GUESTS)
        ]
        readers = [
            SnapshotClient(Session(core, snapshot), rng.random(), 0, GUESTS * UNITS, list(known))
            for _ in range(READERS)
        ]
        for client in guests + readers:
            client.join(SECONDS + 90)
            assert not client.is_alive(), f"hangs with {client.flying} in flight"
            assert client.error is None, client.error
            assert client.session.end() == "disconnected by the client"
            assert client.served > 0
        disk._inject(None)
        snapshot._inject(None)
        assert disk.pread(size, 0) == b"".join(unit for guest in guests for unit in guest.known)
        assert snapshot.pread(size, 0) == t0
    assert core._buffers()[1] == core._buffers()[2], "a buffer was not given back"


def test_a_later_read_overtakes_a_write_that_waits(core, tmp_path):
    """Nothing is in the buffer when the write comes: the socket's watch brings a helper."""
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (64 * UNIT))
    plan = FaultPlan()
    with cbwcore.Disk(path) as disk, disk.snapshot(tmp_path / "target") as snapshot:
        snapshot._inject(plan)
        plan.stall("pwrite")
        try:
            session = Session(core, disk)
            session.send(WRITE, 0, 1, 0, UNIT, b"2" * UNIT)
            plan.wait_stalled()
            for handle in range(2, 40):
                session.send(READ, 0, handle, 32 * UNIT, UNIT)
                assert session.reply() == (handle, 0, b"1" * UNIT)
        finally:
            plan.release()
        assert session.reply() == (1, 0, None)
        session.send(DISC, 0, 0, 0, 0)
        assert session.end() == "disconnected by the client"


def test_more_writes_wait_than_may_run_and_all_are_answered(core, tmp_path):
    """MAX_RUNNING of them are stalled; the others are read when one of those is done."""
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (64 * 65536))
    plan = FaultPlan()
    with cbwcore.Disk(path) as disk, disk.snapshot(tmp_path / "target") as snapshot:
        snapshot._inject(plan)
        plan.stall("pwrite")
        try:
            session = Session(core, disk)
            for i in range(30):  # small: the socket must take what is not read yet
                session.send(WRITE, 0, i, i * 65536, 512, b"2" * 512)
            plan.wait_stalled(16)
            assert settled(lambda: plan.stalled) == 16
        finally:
            plan.release()
        assert sorted(session.reply()[0] for _ in range(30)) == list(range(30))
        session.send(DISC, 0, 0, 0, 0)
        assert session.end() == "disconnected by the client"


@pytest.mark.parametrize("how", ["stop", "vanish", "disc"])
def test_the_end_waits_for_what_is_in_flight(core, tmp_path, how):
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (64 * 65536))
    plan = FaultPlan()
    with cbwcore.Disk(path) as disk, disk.snapshot(tmp_path / "target") as snapshot:
        snapshot._inject(plan)
        plan.stall("pwrite")
        session = Session(core, disk)
        try:
            for i in range(5):
                session.send(WRITE, 0, i, i * 65536, UNIT, b"2" * UNIT)
            plan.wait_stalled(5)
            if how == "stop":
                session.core.stop()
            elif how == "disc":
                session.send(DISC, 0, 0, 0, 0)
            else:
                session.sock.shutdown(socket.SHUT_WR)
            session.thread.join(0.05)
            assert session.thread.is_alive()
        finally:
            plan.release()
        assert sorted(session.reply()[:2] for _ in range(5)) == [(i, 0) for i in range(5)]
        end = {"stop": "stopped", "disc": "disconnected by the client", "vanish": "gone"}
        assert session.end() == end[how]
        assert disk.pread(UNIT, 4 * 65536) == b"2" * UNIT


def test_stop_at_any_moment(core, tmp_path):
    """serve() returns, and every request that got an answer was done."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * UNIT))
    rng = random.Random(5)
    with cbwcore.Disk(path) as disk:
        for round_number in range(150):
            session = Session(core, disk)
            stopper = threading.Timer(rng.random() * 0.004, session.core.stop)
            stopper.start()
            answered = set()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for i in range(rng.randrange(60)):
                    session.send(WRITE, rng.choice((0, FUA)), i, (i % 64) * UNIT, UNIT, bytes([round_number]) * UNIT)
            with contextlib.suppress(EOFError, ConnectionResetError):
                while True:
                    answered.add(session.reply()[0])
            stopper.join()
            assert session.end() == "stopped"
            for i in answered:
                assert disk.pread(1, (i % 64) * UNIT) == bytes([round_number])


def test_a_large_answer_that_nobody_takes_yet_does_not_stop_the_reading(core, tmp_path):
    """The client sends all of a large write before it takes the large read's answer, which its socket does not hold."""
    size = 1 << 20
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (2 * size))
    with cbwcore.Disk(path) as disk:
        session = Session(core, disk)
        session.send(READ, 0, 1, 0, size)
        assert session.sock.recv(1, socket.MSG_PEEK)  # the answer is on its way, and stuck
        session.send(WRITE, 0, 2, size, size, b"2" * size)
        assert sorted(session.reply() for _ in range(2)) == [(1, 0, b"1" * size), (2, 0, None)]
        session.send(DISC, 0, 0, 0, 0)
        assert session.end() == "disconnected by the client"


# ---- without the GIL, in few threads, in batches ----

HOLDS_THE_GIL = """
import ctypes, sys
import cbwcore

image, path = sys.argv[1:]
with cbwcore.Disk(image) as disk, disk.snapshot() as snapshot, cbwcore.NbdServer(socket=path) as server:
    server.add_export("disk", disk, writable=True)
    print("ready", flush=True)
    sys.stdin.readline()
    print("holds it", flush=True)
    ctypes.PyDLL(None).usleep(5_000_000)  # PyDLL: without giving it up
    print("gives it up", flush=True)
    sys.stdin.read()
"""


def test_requests_are_served_while_another_thread_of_the_server_holds_the_gil(tmp_path):
    """Also those that wait for a copy, for which the reader's part is handed on, and a helper is needed."""
    image, path = tmp_path / "disk", str(tmp_path / "socket")
    image.write_bytes(b"1" * (64 * 65536))
    command = [sys.executable, "-c", HOLDS_THE_GIL, str(image), path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            with NbdClient(path) as client:
                client.hello().option(nbd.STRUCTURED_REPLY)
                assert client.go("disk").error == 0
                assert client.read(0, UNIT) == b"1" * UNIT
                process.stdin.write(b"\n")
                assert process.stdout.readline() == b"holds it\n"
                for i in range(0, 64, 8):
                    handles = [client.request(WRITE, (i + k) * 65536, 0, b"2" * UNIT) for k in range(8)]
                    assert [client.reply(handle).error for handle in handles] == [0] * 8
                    assert client.read(i * 65536, 2 * UNIT) == b"2" * UNIT + b"1" * UNIT
                client.ok(FLUSH)
                assert not select.select([process.stdout], [], [], 0)[0], "it was served only when the GIL was free"
            assert process.stdout.readline() == b"gives it up\n"
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def thread_count():
    """Threads of this process, without the kernel's own workers for its rings, which are listed with them."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read())
    return sum(not name.startswith("iou-") for name in names)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
def test_many_requests_do_not_have_a_thread_each(core, tmp_path, waits):
    """What will not wait is served by the reader; of what waits, 16 requests run at once, and one thread is idle."""
    count = 1000
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (count * UNIT))
    plan = FaultPlan()
    with cbwcore.Disk(path) as disk, disk.snapshot(tmp_path / "target", cluster_size=UNIT) as snapshot:
        snapshot._inject(plan)
        if waits:
            plan.stall("pwrite")
        session = Session(core, disk)
        session.send(READ, 0, 0, 0, UNIT)
        session.reply()
        before = thread_count()
        cmd, data = (WRITE, b"2" * 512) if waits else (READ, b"")
        requests = [struct.pack(">IHHQQI", 0x25609513, 0, cmd, i, i * UNIT, 512) + data for i in range(count)]
        sender = threading.Thread(target=session.sock.sendall, args=(b"".join(requests),), daemon=True)
        sender.start()
        seen = []
        try:
            if waits:
                plan.wait_stalled(16)
                assert settled(lambda: plan.stalled) == 16
            seen.append(thread_count())
        finally:
            plan.release()
        handles = []
        for i in range(count):
            handles.append(session.reply()[0])
            if i % 10 == 0:
                seen.append(thread_count())
        sender.join()
        assert sorted(handles) == list(range(count))
        assert max(seen) - before <= 1 + (17 if waits else 0), seen
        session.send(DISC, 0, 0, 0, 0)
        assert session.end() == "disconnected by the client"


@pytest.mark.parametrize(("cmd", "length", "most"), [(READ, 64, 100), (WRITE, 64, 500), (READ, UNIT, 500)])
def test_answers_to_many_requests_go_out_in_few_sends(core, tmp_path, cmd, length, most):
    """In the best of many tries: a write that noise made slow has those after it answered one by one for a while."""
    path = tmp_path / "disk"
    path.write_bytes(b"1" * (1 << 20))
    with cbwcore.Disk(path) as disk:
        assert any(count_sends(core, disk, cmd, length, 1000) <= most for _ in range(40))


def count_sends(core, disk, cmd, length, count):
    """How many sends the answers take. The socket keeps their bounds, so that they can be counted at the other end."""
    session = Session(core, disk, kind=socket.SOCK_SEQPACKET)
    data = b"2" * length if cmd == WRITE else b""
    requests = [struct.pack(">IHHQQI", 0x25609513, 0, cmd, i, i * length % (1 << 19), length) for i in range(count)]
    session.sock.sendall(b"".join(head + data for head in requests))
    left, sends = count * (16 if cmd == WRITE else 28 + length), 0
    while left:
        left -= len(session.sock.recv(1 << 20))
        sends += 1
    session.send(DISC, 0, 0, 0, 0)
    assert session.end() == "disconnected by the client"
    return sends
