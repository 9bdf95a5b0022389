"""The NBD server in this process; the handshake without one; certificates."""

import contextlib
import logging
import socket
import ssl

import engine_support
import pytest
from engine_support import CLUSTER
from handshake_support import SIZE, HandshakeClient
from nbd_support import Client
from tls_support import make_authority, make_certificate, openssl

from cbwcore.nbd import NbdLimits, NbdServer
from cbwcore.nbd.exports import Export, Exports

rig = engine_support.rig


# ---- the server ----


class Host:
    """Servers and their clients; all are gone at the end, also of a failed test."""

    def __init__(self, rig):
        self.rig = rig
        self.undo = contextlib.ExitStack()
        self.servers = []

    def path(self):
        return str(self.rig.path("socket"))

    def serve(self, *, exports=True, limits=None, **options):
        """A server on a unix socket, if ``options`` do not say otherwise, with an exported disk."""
        if not options.keys() & {"listen", "sockets", "socket"}:
            options["socket"] = self.path()
        server = NbdServer(limits=NbdLimits(**(limits or {})), **options)
        self.servers.append(server)
        server.path = options.get("socket")
        if exports:
            server.disk = self.rig.disk()
            server.add_export("disk", server.disk, writable=True)
        return server

    def connect(self, where, **options):
        """A client that has said nothing; of a server, or an address."""
        return self.undo.enter_context(Client(getattr(where, "path", where), **options))

    def open(self, where, name="disk"):
        """A client that is served."""
        client = self.connect(where).hello()
        assert client.go(name).error == 0
        return client

    def open_tls(self, where, context):
        """A client that is served in a TLS session."""
        client = self.connect(where).hello().starttls(context, "localhost")
        assert client.go("disk").error == 0
        return client

    def close(self):
        for plan in self.rig.plans:
            plan.release()
        self.undo.close()
        for closer in [self.rig.run(server.close) for server in self.servers]:
            closer.result()


@pytest.fixture
def host(rig):
    made = Host(rig)
    yield made
    made.close()


@pytest.fixture
def log(caplog):
    """The text of what the server logged, from ``level`` on; `caplog` fails no test by itself."""
    caplog.set_level(logging.DEBUG, "cbwcore")

    def text(level=logging.DEBUG):
        return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= level)

    return text


@pytest.fixture
def unix_listener(place):
    """``unix_listener(path, listen=True)``: somebody else's socket."""
    with contextlib.ExitStack() as undo:

        def make(path, *, listen=True, kind=socket.SOCK_STREAM):
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, kind))
            sock.bind(str(path))
            if listen and kind == socket.SOCK_STREAM:
                sock.listen()
            return sock

        yield make


@pytest.fixture
def client_context(certificates):
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


# ---- the handshake ----


@pytest.fixture
def connect():
    """``connect(exports, ...)``: a HandshakeClient; closed at the end."""
    with contextlib.ExitStack() as undo:

        def connect(exports, **options):
            client = HandshakeClient(exports, **options)
            undo.callback(client.close)
            return client

        yield connect


@pytest.fixture
def exports(make_disk):
    """ "disk", writable, with bitmaps "b0" and "b1"; "snapshot" of it; and "other", read-only."""
    disk = make_disk(SIZE)
    disk.bitmaps.add("b0")
    disk.bitmaps.add("b1", granularity=512)
    exports = Exports()
    exports.add(Export("disk", disk, writable=True, bitmaps=["b0", "b1"], description="the guest's"))
    exports.add(Export("snapshot", disk.snapshot(), discard=True))
    exports.add(Export("other", make_disk(CLUSTER, "other.img")))
    return exports


@pytest.fixture(scope="session")
def authorities(tmp_path_factory):
    """A directory with "ca", "server", "client" and "revoked" by it, "stranger" by another authority, and crl.pem."""
    home = tmp_path_factory.mktemp("authorities")
    for name in ("ca", "other"):
        make_authority(home, name, f"{name}.pem")
        (home / f"{name}.index").touch()
        (home / f"{name}.cnf").write_text(
            f"[ca]\ndefault_ca=x\n[x]\ndatabase={name}.index\ndefault_md=sha256\ndefault_crl_days=2\n"
        )
    for name, by in {"server": "ca", "client": "ca", "revoked": "ca", "stranger": "other"}.items():
        make_certificate(home, name, f"{name}.pem", authority=(f"{by}.pem", by), subject=name)
    ca = ["ca", "-config", "ca.cnf", "-keyfile", "ca-key.pem", "-cert", "ca.pem"]
    openssl(home, *ca, "-gencrl", "-out", "empty-crl.pem")
    openssl(home, *ca, "-revoke", "revoked.pem")
    openssl(home, *ca, "-gencrl", "-out", "crl.pem")
    return home


@pytest.fixture
def directory(tmp_path, authorities):
    """A directory as TlsConfig wants it."""
    for name, source in {"ca-cert": "ca", "server-cert": "server", "server-key": "server-key"}.items():
        (tmp_path / f"{name}.pem").write_bytes((authorities / f"{source}.pem").read_bytes())
    return tmp_path


@pytest.fixture
def as_client(authorities):
    """``as_client(name)``: the ssl context of a client with that certificate, or with none."""

    def as_client(name="client"):
        context = ssl.create_default_context(cafile=str(authorities / "ca.pem"))
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if name:
            context.load_cert_chain(authorities / f"{name}.pem", authorities / f"{name}-key.pem")
        return context

    return as_client
