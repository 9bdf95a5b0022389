"""The NBD server around its connections: exports come and go, limits, idle times, breaks."""

import contextlib
import errno
import logging
import os
import socket
import subprocess
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, stalled, until
from nbd_support import nbd_threads
from programs_support import need

import cbwcore
from cbwcore.nbd import NbdServer
from cbwcore.nbd import service as service_module

WRITTEN = b"by NBD" * 100


# ---- exports ----


def test_exports_come_and_go_while_others_are_served(host):
    server = host.serve()
    client = host.open(server)
    for i in range(3):
        other = host.rig.disk()
        server.add_export("other", other, writable=True)
        assert server.exports == ("disk", "other")
        second = host.open(server, "other")
        assert second.read(0, 1000) == other.t0[:1000]
        server.remove_export("other")
        assert second.dropped() == b""
        assert host.connect(server).hello().go("other").error == nbd.ERR_UNKNOWN
        assert client.read(i, 1000) == server.disk.t0[i : i + 1000]
    assert host.connect(server).hello().option(nbd.LIST).names == ["disk"]


def test_the_first_export_is_the_default_one(host):
    server = host.serve(exports=False)
    assert host.connect(server).hello().go("").error == nbd.ERR_UNKNOWN
    sizes = {name: host.rig.disk(n * CLUSTER) for n, name in enumerate("abc", 1)}
    for name, disk in sizes.items():
        server.add_export(name, disk)
    client = host.connect(server).hello()
    assert client.go("").error == 0
    assert client.size == CLUSTER
    server.remove_export("a")
    assert client.dropped() == b""
    client = host.connect(server).hello()
    assert client.go("").error == 0
    assert client.size == 2 * CLUSTER


def test_a_name_is_used_once_and_must_be_there_to_be_removed(host):
    server = host.serve()
    with pytest.raises(cbwcore.ConfigError, match="'disk' already"):
        server.add_export("disk", server.disk)
    for name in ("", "other"):
        with pytest.raises(cbwcore.ConfigError, match="no export"):
            server.remove_export(name)
    assert server.exports == ("disk",)


def test_an_export_is_removed_after_what_is_in_flight(host):
    server = host.serve()
    client, plan = host.open(server), host.rig.plan(server.disk)
    plan.stall("pwrite")
    handle = client.request(nbd.WRITE, 0, 0, WRITTEN)
    stalled(plan)
    removal = host.rig.run(server.remove_export, "disk")
    removal.reaches(lambda: server.exports == (), "the export has gone")
    assert host.connect(server).hello().go("disk").error == nbd.ERR_UNKNOWN
    assert not removal.done, "it did not wait"
    plan.release()
    removal.result()
    assert client.reply(handle).error == 0
    assert client.dropped() == b""
    until(lambda: server.connections == 1, "the other client is left")
    assert server.disk.pread(len(WRITTEN), 0) == WRITTEN
    server.add_export("disk", server.disk, writable=True)
    assert host.open(server).read(0, 10) == WRITTEN[:10]


@pytest.mark.parametrize("end", ["remove_export", "close"])
def test_whoever_has_just_chosen_an_export_does_not_slip_in(host, monkeypatch, end):
    """The handshake is over, and the connection is not yet one that is served, when the export goes."""
    server = host.serve()
    chosen, go_on = threading.Event(), threading.Event()
    make_core = service_module.make_core

    def slow(*args):
        chosen.set()
        assert go_on.wait(LIMIT)
        return make_core(*args)

    monkeypatch.setattr(service_module, "make_core", slow)
    client = host.open(server)
    assert chosen.wait(LIMIT)
    client.request(nbd.WRITE, 0, 0, WRITTEN)
    ending = host.rig.run(server.remove_export, "disk") if end == "remove_export" else host.rig.run(server.close)
    if end == "remove_export":
        ending.result()
        server.add_export("disk", server.disk)  # the same name, and not the same export
    else:
        ending.reaches(lambda: not os.path.exists(server.path), "it is closing")
    go_on.set()
    assert client.dropped() == b""
    ending.result()
    assert server.disk.pread(len(WRITTEN), 0) == server.disk.t0[: len(WRITTEN)]


def test_what_was_closed_serves_nobody(host, log):
    server = host.serve()
    snapshot = host.rig.snapshot(server.disk)
    server.add_export("snapshot", snapshot)
    snapshot.close()
    assert host.open(server, "snapshot").dropped() == b""
    assert "dropped in the handshake: " in log(logging.WARNING)
    assert "is closed" in log(logging.WARNING)
    server.disk.close()
    assert host.open(server).call(nbd.READ, 0, 10).error == nbd.ESHUTDOWN
    assert "Traceback" not in log()


@pytest.mark.parametrize("name", ["disk", "", "ä/b c?#%&=:@+", "/abs", "1" * 1023, "new\nline"], ids=ascii)
def test_uris_are_quoted(host, name):
    path = f"{host.rig.folder}/a b&c?#%;+=ü"
    server = host.serve(exports=False, socket=path)
    server.add_export(name, host.rig.disk())
    uri = server.uri(name)
    assert server.uris == (uri,)
    assert uri.isascii()
    assert not set(uri) & set(" \n")
    need("nbdinfo")
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{4 * CLUSTER}\n", "")


def test_uris_of_all_places(host, unix_listener):
    given = unix_listener(host.path())
    path = host.path()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        port = six.getsockname()[1]
        server = host.serve(socket=path, listen="127.0.0.1:0", sockets=[given, six])
        own, tcp, first, second = server.uris
    assert own == server.uri("disk") == server.uri("").replace("///?", "///disk?")
    assert tcp.startswith("nbd://127.0.0.1:")
    assert first == f"nbd+unix:///disk?socket={given_path(first)}"
    assert second == f"nbd://[::1]:{port}/disk"
    with pytest.raises(cbwcore.ConfigError, match="no export 'x'"):
        server.uri("x")


def given_path(uri):
    return uri.partition("socket=")[2]


def test_a_server_that_does_not_listen_has_no_uris(host):
    server = host.serve(sockets=[])
    assert server.uris == ()
    assert "does not listen" in repr(server)
    with pytest.raises(cbwcore.ConfigError, match="does not listen"):
        server.uri("disk")


def test_clients_wait_until_it_serves(host):
    server = host.serve(start_serving=False)
    client = host.connect(server, timeout=0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.timeout = LIMIT
    server.start_serving()
    server.start_serving()
    assert client.hello().go("disk").error == 0


# ---- limits ----


def test_more_connections_than_the_limit_are_closed_at_once(host, log):
    server = host.serve(limits={"connections": 2})
    first, _ = host.open(server), host.connect(server).hello()
    for _ in range(3):
        assert host.connect(server).dropped() == b""
    assert server.connections == 2
    assert log(logging.WARNING).count("refused: there are 2 connections, the limit") == 3
    first.disconnect()
    until(lambda: server.connections == 1, "the first has ended")
    assert host.open(server).size > 0


def test_so_many_negotiate_and_the_others_wait(host):
    server = host.serve(limits={"negotiating": 2})
    first, second = host.connect(server).hello(), host.connect(server).hello()
    third = host.connect(server, timeout=0.2)
    with pytest.raises(TimeoutError):
        third.recv(1)
    assert server.connections == 2
    third.timeout = LIMIT
    assert first.go("disk").error == 0
    third.hello()
    assert server.connections == 3
    fourth = host.connect(server, timeout=0.2)
    with pytest.raises(TimeoutError):
        fourth.recv(1)
    fourth.timeout = LIMIT
    second.sock.close()
    fourth.hello()


def test_so_many_negotiate_wherever_they_came_in(host, unix_listener):
    paths = [host.path() for _ in range(4)]
    listeners = [unix_listener(path) for path in paths]
    server = host.serve(sockets=listeners, limits={"negotiating": 1}, start_serving=False)
    clients = [host.connect(path, timeout=0.3) for path in paths]
    server.start_serving()
    greeted = []
    for client in clients:
        with contextlib.suppress(TimeoutError):
            greeted.append(client.recv(18))
    assert len(greeted) == 1


def test_a_handshake_lasts_so_long_and_lets_the_others_in_then(host, log):
    server = host.serve(limits={"negotiating": 1, "handshake_seconds": 0.3})
    began = time.monotonic()
    idle = [host.connect(server) for _ in range(3)]
    for client in idle:
        assert len(client.dropped()) == 18
    assert 0.8 < time.monotonic() - began < LIMIT
    assert log(logging.WARNING).count("dropped in the handshake: ") == 3
    assert host.open(server).size > 0


class Failing(socket.socket):
    """A listening socket whose first calls of accept() fail."""

    error, times, calls = errno.EMFILE, 3, 0

    def accept(self):
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EPROTO])
def test_accepting_that_fails_is_tried_again_without_haste(host, log, monkeypatch, code):
    monkeypatch.setattr(service_module, "ACCEPT_PAUSE", 0.1)
    listener = Failing(socket.AF_UNIX)
    listener.error = code
    listener.bind(path := host.path())
    listener.listen()
    host.serve(sockets=[listener])
    began = time.monotonic()
    assert host.open(path).size > 0
    assert time.monotonic() - began >= 0.3
    assert listener.calls == 4
    assert log(logging.WARNING).count(f"accepting a connection failed: {os.strerror(code)}") == 3


def test_without_descriptors_it_waits_and_does_not_spin(run_python, place):
    code = """
import os, resource, socket, sys, time, cbwcore
from cbwcore.nbd import NbdServer
path = sys.argv[1]
open(path + ".img", "wb").write(bytes(65536))
with cbwcore.Disk(path + ".img") as disk, NbdServer(socket=path) as server:
    server.add_export("disk", disk)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for client in clients:
        client.connect(path)
    began = time.process_time()
    time.sleep(0.7)
    assert time.process_time() - began < 0.2, "it spins"
    for fd in taken:
        os.close(fd)
    for client in clients:
        client.settimeout(10)
        assert client.recv(18)[:8] == b"NBDMAGIC"
print("done")
"""
    done = run_python(code, place / "s")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_client_that_did_not_wait_is_nothing(host, log):
    listener = Failing(socket.AF_UNIX)
    listener.error, listener.times = errno.ECONNABORTED, 100
    listener.bind(path := host.path())
    listener.listen()
    host.serve(sockets=[listener])
    began = time.monotonic()
    assert host.open(path).size > 0
    assert time.monotonic() - began < 5
    assert log(logging.WARNING) == ""


def test_an_accept_that_fails_does_not_keep_it_from_closing(host):
    listener = Failing(socket.AF_UNIX)
    listener.times = 10**9
    listener.bind(path := host.path())
    listener.listen()
    server = host.serve(sockets=[listener])
    host.connect(path)
    until(lambda: listener.calls, "a call of accept()")
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 1


def test_a_bug_in_accepting_does_not_end_it(host, log, monkeypatch):
    monkeypatch.setattr(service_module, "ACCEPT_PAUSE", 0.05)
    calls = []

    def broken(sock):
        calls.append(sock)
        if len(calls) == 1:
            sock.close()
            raise KeyError("a bug")

    monkeypatch.setattr(service_module, "prepare", broken)
    server = host.serve()
    assert host.connect(server).dropped() == b""
    assert host.open(server).size > 0
    assert "accepting connections failed" in log(logging.ERROR)


def test_a_thread_that_cannot_be_had_costs_one_connection(host, log, monkeypatch):
    monkeypatch.setattr(service_module, "ACCEPT_PAUSE", 0.05)
    server = host.serve()
    start, failed = threading.Thread.start, []

    def refuse_once(self):
        if self.name.startswith("nbd process") and not failed:
            failed.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    assert host.connect(server).dropped() == b""
    assert host.open(server).size > 0
    assert "refused: can't start new thread" in log(logging.WARNING)
    assert server.connections == 1


# ---- idle ----


def test_idle_seconds(host):
    server = host.serve()
    until(lambda: server.idle_seconds > 0.05, "it is idle from the start")
    client = host.connect(server)
    until(lambda: server.connections == 1, "a client that only connected")
    assert server.idle_seconds == 0
    client.hello().go("disk")
    assert server.idle_seconds == 0
    client.disconnect()
    until(lambda: server.connections == 0, "it is gone")
    first = server.idle_seconds
    until(lambda: server.idle_seconds > first, "time goes on")


def test_it_is_idle_since_it_let_clients_in(place):
    """Not since it was made: a disk that is opened slowly must not use up the time that clients have to come."""
    with NbdServer(socket=place / "socket", start_serving=False) as server:
        until(lambda: server.idle_seconds > 0.5, "time goes on")
        server.start_serving()
        began = server.idle_seconds
        assert began < 0.5
        until(lambda: server.idle_seconds > began + 0.01, "time goes on")
        again = server.idle_seconds
        server.start_serving()
        assert server.idle_seconds >= again


# ---- one connection in this thread ----


def test_serve_connection_serves_until_the_client_leaves(host):
    server = host.serve(sockets=[])
    ours, theirs = socket.socketpair()
    serving = host.rig.run(server.serve_connection, ours)
    client = host.open(theirs)
    client.ok(nbd.WRITE, 0, 0, WRITTEN)
    assert server.connections == 1
    assert not serving.done
    client.disconnect()
    serving.result()
    assert ours.fileno() == -1
    assert server.disk.pread(len(WRITTEN), 0) == WRITTEN


def test_close_ends_serve_connection(host):
    server = host.serve(sockets=[])
    ours, theirs = socket.socketpair()
    serving = host.rig.run(server.serve_connection, ours)
    client = host.open(theirs)
    server.close()
    serving.result()
    assert client.dropped() == b""


def test_serve_connection_holds_to_the_limits(host, log):
    server = host.serve(sockets=[], limits={"connections": 1}, allow_uids=[os.geteuid()])
    pairs = [socket.socketpair() for _ in range(2)]
    serving = host.rig.run(server.serve_connection, pairs[0][0])
    host.open(pairs[0][1])
    server.serve_connection(pairs[1][0])
    assert host.connect(pairs[1][1]).dropped() == b""
    assert "refused: there are 1 connections" in log(logging.WARNING)
    pairs[0][1].close()
    serving.result()
    stranger = host.serve(sockets=[], allow_uids=[os.geteuid() + 1])
    pair = socket.socketpair()
    stranger.serve_connection(pair[0])
    assert host.connect(pair[1]).dropped() == b""


def test_serve_connection_takes_stream_sockets(host):
    server = host.serve(sockets=[])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        with pytest.raises(cbwcore.ConfigError, match="no unix or TCP stream socket"):
            server.serve_connection(ours)
        assert ours.fileno() >= 0


def test_a_signals_handler_may_close_what_its_thread_serves(run_python, place):
    """While it negotiates, in Python: the handler runs in the thread that it would wait for."""
    code = """
import os, signal, socket, sys, threading, time, cbwcore
from cbwcore.nbd import NbdServer
path = sys.argv[1]
open(path, "wb").write(bytes(65536))
with cbwcore.Disk(path) as disk, NbdServer() as server:
    server.add_export("disk", disk)
    ours, theirs = socket.socketpair()
    signal.signal(signal.SIGTERM, lambda *_: server.close())
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    server.serve_connection(ours)
    assert theirs.recv(100)[:8] == b"NBDMAGIC"
    assert theirs.recv(100) == b""
print("done")
"""
    done = run_python(code, place / "disk")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# ---- breaks ----


def breaking(host, server, **options):
    """A snapshot that the next guest write breaks."""
    return host.rig.snapshot(server.disk, on_cbw_error="break-snapshot", target_limit=0, **options)


def test_a_break_by_an_nbd_write_is_told(host, log):
    server, told = host.serve(), []
    snapshot = breaking(host, server, on_break=told.append)
    server.add_export("snapshot", snapshot)
    client = host.open(server)
    client.ok(nbd.WRITE, 0, 0, WRITTEN)
    until(lambda: told, "the break is told")
    assert told == [snapshot]
    assert snapshot.state == "broken"
    assert snapshot.error.errno == errno.ENOSPC
    assert "is broken" in log(logging.ERROR)
    client.ok(nbd.WRITE, 0, 0, WRITTEN)
    server.close()
    assert told == [snapshot]


def test_a_break_is_told_where_only_a_snapshot_is_exported(host):
    """The writes come by another server, whose wake-up is its own; this one tells when it closes."""
    server, told = host.serve(), []
    snapshot = breaking(host, server, on_break=told.append)
    other = host.serve(exports=False)
    other.add_export("snapshot", snapshot)
    plan = host.rig.plan(server.disk)
    plan.stall("pwrite")
    handle = host.open(server).request(nbd.WRITE, 0, 0, WRITTEN)
    assert handle
    stalled(plan)
    assert snapshot.state == "broken"
    other.close()
    assert told == [snapshot]
    plan.release()


@pytest.mark.parametrize("end", ["close", "remove_export"])
def test_a_break_just_before_the_end_is_told(host, monkeypatch, end):
    """The break comes while the end already waits for that very write, and the eventfd is not looked at any more."""
    server, told = host.serve(), []
    snapshot = breaking(host, server, on_break=told.append)
    plan = host.rig.plan(server.disk)
    plan.stall("pread")  # the copy's
    client = host.open(server)
    handle = client.request(nbd.WRITE, 0, 0, WRITTEN)
    stalled(plan)
    ending = host.rig.run(server.close) if end == "close" else host.rig.run(server.remove_export, "disk")
    ending.reaches(lambda: server.exports == () or not os.path.exists(server.path), "it ends")
    assert told == []
    plan.release()
    ending.result()
    assert client.reply(handle).error == 0
    assert told == [snapshot]


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3)], ids=repr)
def test_a_callback_that_fails_is_logged(host, log, error):
    def fail(snapshot):
        raise error

    server = host.serve()
    snapshot = breaking(host, server, on_break=fail)
    client = host.open(server)
    client.ok(nbd.WRITE, 0, 0, WRITTEN)
    until(lambda: "failed" in log(logging.ERROR), "the failure is logged")
    assert snapshot.state == "broken"
    assert host.open(server).read(0, 6) == WRITTEN[:6]


def write_that_breaks(host, server, act):
    """A guest's write whose break does ``act``: it is done, its callback too, and its client is dropped."""
    done = threading.Event()

    def on_break(snapshot):
        act()
        done.set()

    breaking(host, server, on_break=on_break)
    client = host.open(server)
    assert client.call(nbd.WRITE, 0, 0, WRITTEN).error == 0
    assert done.wait(LIMIT)
    assert client.dropped() == b""


def test_a_callback_may_close_the_server(host):
    server = host.serve()
    write_that_breaks(host, server, server.close)
    server.close()
    until(lambda: not nbd_threads(), "the end of its threads")


def test_a_callback_may_remove_the_export(host):
    server = host.serve()
    write_that_breaks(host, server, lambda: server.remove_export("disk"))
    server.add_export("disk", server.disk)
    assert host.open(server).size > 0
