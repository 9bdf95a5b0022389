"""Every end of a server: close at any moment, forgotten servers, forked children."""

import contextlib
import fcntl
import gc
import logging
import os
import signal
import socket
import struct
import termios
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, stalled, until
from nbd_support import Client, Disconnected, nbd_threads, sockets_open

import cbwcore
from cbwcore.nbd import NbdServer, TlsConfig
from cbwcore.nbd import service as service_module

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on: threads are the point

WRITTEN = b"by NBD" * 100


# ---- closing ----


def test_close_ends_every_kind_of_client(host, log):
    """Idle, negotiating, silent and busy ones; the answer to what is in flight still comes."""
    server = host.serve()
    idle, negotiating, silent = host.open(server), host.connect(server).hello(), host.connect(server)
    silent.recv(18)
    busy, plan = host.open(server), host.rig.plan(server.disk)
    plan.stall("pwrite")
    handle = busy.request(nbd.WRITE, 0, 0, WRITTEN)
    stalled(plan)
    closing = host.rig.run(server.close)
    for client in (negotiating, silent, idle):
        assert client.dropped() == b""
    assert not os.path.exists(server.path)
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
        late.connect(server.path)
    closing.reaches(lambda: server.connections == 1, "it waits for the busy one")
    plan.release()
    assert busy.reply(handle).error == 0
    assert busy.dropped() == b""
    closing.result()
    assert server.disk.pread(len(WRITTEN), 0) == WRITTEN
    assert nbd_threads() == []
    assert server.connections == 0
    assert log(logging.WARNING) == ""


@pytest.mark.parametrize("stage", ["silent", "flags", "options"])
def test_close_does_not_wait_for_a_handshake(host, stage):
    """CVE-2024-7409: a client that connects and does nothing must not hold up the end, nor be touched after it."""
    server = host.serve(limits={"handshake_seconds": 3600.0})
    client = host.connect(server)
    if stage == "silent":
        client.recv(18)
    else:
        client.hello()
    if stage == "options":
        client.option(nbd.LIST)
        client.send(nbd.option_header(nbd.GO, 100))
    began = time.monotonic()
    host.rig.run(server.close).result(5)
    assert time.monotonic() - began < 5
    assert client.dropped() == b""


def test_close_does_not_wait_for_the_backlog(host):
    server = host.serve(limits={"negotiating": 1, "handshake_seconds": 3600.0})
    clients = [host.connect(server) for _ in range(5)]
    clients[0].recv(18)
    host.rig.run(server.close).result(5)
    for client in clients:
        assert client.dropped() == b""


def test_closed_twice_and_from_two_threads(host):
    server = host.serve()
    client, plan = host.open(server), host.rig.plan(server.disk)
    plan.stall("pread")
    handle = client.request(nbd.READ, 0, 100)
    stalled(plan)
    closers = [host.rig.run(server.close) for _ in range(3)]
    for closer in closers:
        closer.reaches(lambda: not os.path.exists(server.path), "it waits")
    plan.release()
    for closer in closers:
        closer.result()
    assert bytes(client.reply(handle).data) == server.disk.t0[:100]
    server.close()
    assert "closed" in repr(server)


def test_what_a_closed_server_says(host):
    server = host.serve()
    server.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for call in (
            lambda: server.add_export("x", server.disk),
            lambda: server.remove_export("disk"),
            lambda: server.idle_seconds,
            server.start_serving,
            lambda: server.serve_connection(ours),
        ):
            with pytest.raises(ValueError, match="closed"):
                call()
        assert ours.fileno() >= 0
    assert server.connections == 0
    assert server.exports == ("disk",)


def test_close_leaves_nothing_open(host, unchanged):
    path, disk = host.path(), host.rig.disk()
    with unchanged(disk):
        with NbdServer(socket=path) as server:
            server.add_export("disk", disk)
            for _ in range(3):
                client = host.open(path)
                client.read(0, 1)
                client.disconnect()
                client.sock.close()
            with Client(path) as client:
                client.hello()
        gc.collect()
    assert nbd_threads() == []


def test_a_tcp_client_gets_all_its_answers_though_it_sends_more(host):
    """Closing a TCP socket with requests unread makes Linux throw away the answers that it has not sent yet."""
    disk = host.rig.disk(64 * CLUSTER)
    server = host.serve(exports=False, listen="127.0.0.1:0")
    server.add_export("disk", disk)
    port = int(server.uri("disk").split(":")[2].split("/")[0])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        client = host.connect(sock)
        assert client.hello().go("disk").error == 0
        handle = client.request(nbd.READ, 0, 48 * CLUSTER)
        until(lambda: unread(sock) > 0, "the answer is on its way")
        closing = host.rig.run(server.close)
        closing.reaches(lambda: "closed" in repr(server), "it is closing")
        with contextlib.suppress(Disconnected):
            for _ in range(50):
                client.send(nbd.header(nbd.READ, 0, 1, handle=10**6))
        reply = client.reply(handle)
        assert bytes(reply.data) == disk.t0[: 48 * CLUSTER]
        closing.result()


def unread(sock):
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), "little")


def test_a_tcp_peer_that_is_gone_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            began = time.monotonic()
            service_module.wait_until_sent(sock, 0.3)
            assert time.monotonic() - began >= 0.3
            client.close()
            service_module.wait_until_sent(sock, LIMIT)
            assert time.monotonic() - began < LIMIT / 2


def test_a_server_that_is_forgotten_warns_and_ends(host):
    path, disk = host.path(), host.rig.disk()
    server = NbdServer(socket=path)
    server.add_export("disk", disk)
    client = host.open(path)
    with pytest.warns(ResourceWarning, match="unclosed <NbdServer"):  # noqa: PT031  (when it is collected)
        del server
        gc.collect()
    assert client.dropped() == b""
    until(lambda: not nbd_threads(), "the end of its threads")
    assert not os.path.exists(path)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_the_interpreter_ends_with_a_server(run_python, place, how):
    code = """
import os, sys, cbwcore, socket
from cbwcore.nbd import NbdServer
path, how = sys.argv[1:]
open(path + ".img", "wb").write(bytes(65536))
disk = cbwcore.Disk(path + ".img")
server = NbdServer(socket=path)
server.add_export("disk", disk)
client = socket.socket(socket.AF_UNIX)
client.connect(path)
assert client.recv(18)[:8] == b"NBDMAGIC"
if how == "closed":
    server.close()
    disk.close()
print("done")
"""
    done = run_python(code, place / "s", how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_constructor_that_fails_says_only_that(run_python):
    code = """
import gc
from cbwcore.nbd import NbdServer
try:
    NbdServer(listen="nonsense")
except ValueError as e:
    print(e)
gc.collect()
"""
    done = run_python(code)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_threads_that_cannot_be_had_leave_nothing_behind(host, monkeypatch, unchanged):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with unchanged():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError):
                NbdServer(socket=host.path())
        gc.collect()


# ---- forks ----


def in_child(call):
    """What ``call`` returned, or raised, in a forked child; it lives until its parent has seen what it wants."""
    reader, writer = os.pipe()
    alive, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        try:
            signal.alarm(10)
            told = call()
        except BaseException as e:
            told = f"{type(e).__name__}: {e}"
        os.write(writer, str(told).encode())
        os.close(writer)
        os.read(alive, 1)
        os._exit(0)
    os.close(writer)
    os.close(alive)
    with os.fdopen(reader) as answer:
        told = answer.read()

    def release():
        os.close(end)
        os.waitpid(pid, 0)

    return told, release


def test_a_forked_child_has_none_of_it(host, certificates, client_context):
    """A client's connection that a child keeps open would not end when the server closes it."""
    before = set(sockets_open())
    server, secret = host.serve(), host.serve(tls=TlsConfig(certificates), listen="127.0.0.1:0", exports=False)
    secret.add_export("disk", server.disk)
    port = int(secret.uri("disk").split(":")[2].split("/")[0])
    clients = [host.open(server), host.connect(server).hello(), host.open_tls(("127.0.0.1", port), client_context)]
    until(lambda: len(nbd_threads()) == 6, "all are served")
    told, release = in_child(lambda: " ".join(set(sockets_open()) - before))
    try:
        assert set(told.split()) == {os.readlink(f"/proc/self/fd/{c.sock.fileno()}") for c in clients}
        assert clients[0].read(0, 10) == server.disk.t0[:10], "the parent goes on"
        server.close()
        secret.close()
        for client in clients:
            assert client.dropped() == b""
        with socket.socket() as late, pytest.raises(ConnectionRefusedError):
            late.connect(("127.0.0.1", port))
    finally:
        release()


def test_a_forked_child_may_close_it(host):
    server = host.serve()
    client = host.open(server)
    told, release = in_child(lambda: (server.close(), repr(server)))
    release()
    assert "closed" in told
    assert os.path.exists(server.path)
    assert client.read(0, 10) == host.open(server).read(0, 10) == server.disk.t0[:10]


def test_a_forked_child_does_not_serve(host):
    server = host.serve()
    told, release = in_child(lambda: server.add_export("x", server.disk))
    release()
    assert told == "ValueError: this NBD server was made before a fork and is not usable in the child"
    assert server.exports == ("disk",)
    assert os.path.exists(server.path)
    assert host.open(server).size > 0


def test_a_child_may_have_its_own_server(host):
    path = host.path()
    host.serve()

    def serve():
        with cbwcore.Disk(host.rig.folder / "childs.img") as disk, NbdServer(socket=path) as server:
            server.add_export("disk", disk, writable=True)
            with Client(path) as client:
                client.hello().go("disk")
                client.ok(nbd.WRITE, 0, 0, WRITTEN)
                return client.read(0, 6)

    (host.rig.folder / "childs.img").write_bytes(bytes(CLUSTER))
    told, release = in_child(serve)
    release()
    assert told == str(WRITTEN[:6])
