"""An NBD server in this process, its disks, and raw clients of it."""

import contextlib
import fcntl
import ssl
import struct
import subprocess
import sys
import termios
import threading
from urllib.parse import urlsplit

import engine_support
import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, Guest, pattern, until
from nbd_support import Client

from cbwcore.nbd import NbdLimits, NbdServer, TlsConfig

rig = engine_support.rig

ALLOCATION = "base:allocation"


class Host:
    """Servers on unix sockets and connections to them; all are gone at the end, also of a failed test."""

    def __init__(self, rig):
        self.rig = rig
        self.servers = []
        self.paths = {}
        self._undo = contextlib.ExitStack()
        self._threads = set(threading.enumerate())

    def serve(self, *, tls=None, **limits):
        """Another server, without exports; ``limits`` are those of NbdLimits."""
        path = str(self.rig.path("socket"))
        server = NbdServer(socket=path, tls=tls, limits=NbdLimits(**limits))
        self.servers.append(server)
        self.paths[server] = path
        return server

    def serve_tcp(self, **limits):
        """Another server, on some port of this machine."""
        server = NbdServer(listen="127.0.0.1:0", limits=NbdLimits(**limits))
        self.servers.append(server)
        server.add_export("here", self.rig.disk(512))
        self.paths[server] = ("127.0.0.1", urlsplit(server.uri("here")).port)
        server.remove_export("here")
        return server

    @property
    def server(self):
        """The first server."""
        return self.servers[0] if self.servers else self.serve()

    def disk(self, content=4 * CLUSTER, *, name="disk", writable=True, bitmaps=(), server=None, **options):
        """A disk that is exported, as `Rig.disk` makes it."""
        disk = self.rig.disk(content, **options)
        (server or self.server).add_export(name, disk, writable=writable, bitmaps=bitmaps)
        return disk

    def snapshot(self, disk, *, name="snapshot", bitmaps=(), discard=False, server=None, **options):
        """A snapshot that is exported."""
        snapshot = self.rig.snapshot(disk, name=name, **options)
        (server or self.server).add_export(name, snapshot, bitmaps=bitmaps, discard=discard)
        return snapshot

    def connect(self, server=None, **options):
        """A client that has said nothing yet."""
        return self._undo.enter_context(Client(self.paths[server or self.server], **options))

    def hello(self, server=None, flags=nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES, **options):
        """A client that negotiates options."""
        return self.connect(server, **options).hello(flags)

    def open(self, name="disk", *, structured=True, contexts=(), server=None, **options):
        """A client in the transmission phase."""
        client = self.hello(server, **options)
        if structured:
            assert client.option(nbd.STRUCTURED_REPLY).error == 0
        if contexts:
            client.meta(nbd.SET_META_CONTEXT, name, *contexts)
            assert set(client.contexts.values()) == set(contexts)
        assert client.go(name).error == 0
        return client

    def context(self, client, name=ALLOCATION):
        """The id of a context that was selected."""
        return next(i for i, found in client.contexts.items() if found == name)

    @staticmethod
    def unread(client):
        """Bytes that lie in a client's socket."""
        return struct.unpack("i", fcntl.ioctl(client.sock, termios.FIONREAD, bytes(4)))[0]

    def ended(self, server=None, connections=0):
        """Wait until the server has no more than that many connections."""
        server = server or self.server
        until(lambda: server.connections <= connections, f"{connections} connections")

    def close(self):
        for plan in self.rig.plans:
            plan.release()
        self._undo.close()
        closers = [Guest(server.close) for server in self.servers]
        for closer in closers:
            closer.result()
        left = set(threading.enumerate()) - self._threads - set(closers) - set(self.rig.guests)
        until(lambda: not any(thread.is_alive() for thread in left), "the end of the server's threads", LIMIT)


@pytest.fixture
def host(rig):
    made = Host(rig)
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def structured(request):
    """Whether structured replies are negotiated."""
    return request.param


# ---- TLS ----


@pytest.fixture
def tls_client(certificates):
    """The context of a client with a certificate."""
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.check_hostname = False
    context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


@pytest.fixture
def tls_host(host, certificates):
    """``tls_host(required=...)``: (host, a server with TLS that exports `disk`)."""

    def tls_host(*, required):
        server = host.serve(tls=TlsConfig(certificates, required=required))
        host.disk(server=server)
        return host, server

    return tls_host


# ---- a server in a process of its own ----

SERVER = """
import sys
import cbwcore
from cbwcore.nbd import NbdLimits, NbdServer

image, socket = sys.argv[1:3]
limits = NbdLimits(**{name: int(value) for name, value in (a.split("=") for a in sys.argv[3:])})
with cbwcore.Disk(image) as disk, disk.snapshot() as snapshot, NbdServer(socket=socket, limits=limits) as server:
    server.add_export("disk", disk, writable=True)
    server.add_export("snapshot", snapshot)
    print("ready", flush=True)
    sys.stdin.read()
"""


class ServerProcess:
    """It serves a disk and its snapshot until `stop`, and must then end well."""

    def __init__(self, image, socket, **limits):
        options = [f"{name}={value}" for name, value in limits.items()]
        command = [sys.executable, "-X", "faulthandler", "-c", SERVER, str(image), str(socket), *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._socket = str(socket)
        self._clients = contextlib.ExitStack()
        self.pid = self._process.pid
        try:
            assert self._process.stdout.readline() == "ready\n"
        except BaseException:
            self.kill()
            raise

    def connect(self):
        return self._clients.enter_context(Client(self._socket))

    def open(self, name="disk"):
        client = self.connect().hello()
        client.option(nbd.STRUCTURED_REPLY)
        assert client.go(name).error == 0
        return client

    def stop(self):
        """End it; it exits 0 with nothing on stderr."""
        _, stderr = self._process.communicate("", timeout=LIMIT)
        assert (self._process.returncode, stderr) == (0, "")

    def leave(self):
        """Close all clients."""
        self._clients.close()

    def kill(self):
        self.leave()
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def server_process(place):
    """``server_process(image, **limits)``: a server in a process of its own."""
    with contextlib.ExitStack() as undo:

        def server_process(image, **limits):
            process = ServerProcess(image, place / "socket", **limits)
            undo.callback(process.kill)
            return process

        yield server_process


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    (folder / "disk").write_bytes(pattern(1 << 20))
    process = ServerProcess(folder / "disk", folder / "socket")
    try:
        yield process
        process.stop()
    finally:
        process.kill()


@pytest.fixture
def process(one_process):
    """A server in a process of its own, which is the same for all tests of a module, and serves after each of them."""
    yield one_process
    guest, reader = one_process.open("disk"), one_process.open("snapshot")
    assert guest.read(0, guest.size) == reader.read(0, guest.size) == pattern(1 << 20)
    one_process.leave()
