"""The NBD server around its connections: where it listens, who is let in, how exports come and go, and every end."""

import contextlib
import errno
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import ssl
import stat
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import engine_support
import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, stalled, until
from nbd_support import Client, Disconnected

import cbwcore
from cbwcore.nbd import NbdLimits, NbdServer, TlsConfig
from cbwcore.nbd import listen as listen_module
from cbwcore.nbd import service as service_module
from cbwcore.nbd.listen import (
    Address,
    activated_sockets,
    is_local,
    listen_tcp,
    listen_unix,
    notify,
    peer_name,
    peer_uid,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on: threads are the point
rig = engine_support.rig

WRITTEN = b"by NBD" * 100
ANYWHERE = "0.0.0.0:0"


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


def need(program):
    """Skip where it is missing (CI makes a failure of it)."""
    if not any(os.access(os.path.join(p, program), os.X_OK) for p in os.environ["PATH"].split(":")):
        pytest.skip(f"there is no {program}")


def sockets_open():
    """The sockets among this process's descriptors."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith("socket:"))


def nbd_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("nbd ")]


# ---- unix sockets ----


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_a_socket_is_for_its_owner_alone_whatever_the_umask(place, umask):
    before = os.umask(umask)
    try:
        sock, file = listen_unix(place / "s")
    finally:
        assert os.umask(before) == umask, "the umask is the process's, and was changed"
    with sock:
        status = os.lstat(place / "s")
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert not os.get_inheritable(sock.fileno())
        file.remove()
    assert os.listdir(place) == []


def test_a_socket_never_has_a_wider_mode(place, monkeypatch):
    """Not even between bind() and chmod()."""
    modes = []
    monkeypatch.setattr(os, "chmod", lambda path, mode: modes.append(stat.S_IMODE(os.lstat(path).st_mode)))
    before = os.umask(0)
    try:
        sock, _ = listen_unix(place / "s")
    finally:
        os.umask(before)
    sock.close()
    assert modes == [0o600]


def test_a_stale_socket_is_replaced(host, place, unix_listener):
    unix_listener(place / "s").close()
    assert (place / "s").is_socket()
    server = host.serve(socket=place / "s")
    assert host.open(str(place / "s")).read(0, 10) == server.disk.t0[:10]
    assert os.listdir(place).count("s") == 1
    assert not [name for name in os.listdir(place) if name.startswith(".")], "something was left beside it"


def fill_backlog(undo, path):
    """Connections to a socket whose owner accepts none, until it takes no more."""
    for _ in range(10):
        client = undo.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return
    raise AssertionError("the backlog is never full")


@pytest.mark.parametrize("backlog_full", [False, True], ids=["quiet", "backlog full"])
def test_a_socket_in_use_is_refused_and_nothing_changed(place, unix_listener, unchanged, backlog_full):
    unix_listener(place / "s", listen=False).listen(0)
    with contextlib.ExitStack() as waiting:
        if backlog_full:
            fill_backlog(waiting, place / "s")
        with unchanged(place / "s"), pytest.raises(cbwcore.ConfigError, match=r"/s is in use") as refused:
            NbdServer(socket=place / "s")
        assert str(place / "s") in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda path, listener: path.write_bytes(b"precious"),
        lambda path, listener: path.mkdir(),
        lambda path, listener: path.symlink_to("nowhere"),
        lambda path, listener: os.mkfifo(path),
        lambda path, listener: listener(path, kind=socket.SOCK_DGRAM),
        lambda path, listener: (listener(path.parent / "live"), path.symlink_to("live")),
        lambda path, listener: (listener(path.parent / "dead").close(), path.symlink_to("dead")),
    ],
    ids=["file", "directory", "dangling link", "fifo", "datagram socket", "link to a socket", "link to a stale one"],
)
def test_a_path_that_is_no_stale_socket_is_refused_and_nothing_changed(place, unix_listener, unchanged, make):
    make(place / "s", unix_listener)
    with unchanged(), pytest.raises(cbwcore.ConfigError, match=r"/s is in use"):
        NbdServer(socket=place / "s")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("", "one or more characters"),
        ("a\0b", "NUL"),
        (b"bytes", "bytes"),
        ("x" * 300, "at most 107"),
        ("\udfff", "cannot be encoded"),
    ],
    ids=["empty", "NUL", "bytes", "long", "surrogate"],
)
def test_a_path_that_cannot_be_is_refused(place, unchanged, monkeypatch, path, text):
    monkeypatch.chdir(place)
    with unchanged(), pytest.raises(cbwcore.ConfigError, match=text):
        NbdServer(socket=path)


def test_a_path_in_no_directory_is_refused(place, unchanged):
    with unchanged(), pytest.raises(cbwcore.ConfigError, match=r"missing/s cannot be made: No such file"):
        NbdServer(socket=place / "missing" / "s")


def test_the_longest_path_works_and_one_byte_more_does_not(host, place, unix_listener):
    longest = f"{place}/{'x' * (107 - len(str(place)) - 1)}"
    assert len(longest) == 107
    unix_listener(longest).close()  # and it is stale
    host.serve(socket=longest)
    assert host.open(longest).size > 0
    with pytest.raises(cbwcore.ConfigError, match="108 bytes"):
        NbdServer(socket=longest + "x")


def test_one_of_those_who_want_a_stale_path_gets_it(place, unix_listener, in_threads):
    """Whoever gets it is reached there, and the others are refused; nobody listens where no one finds it."""
    path = str(place / "s")
    for _ in range(150):
        unix_listener(path).close()
        got = []

        def attempt(got=got):
            with contextlib.suppress(cbwcore.ConfigError):
                got.append(listen_unix(path))

        in_threads(*[attempt] * 4)
        assert len(got) <= 1, "two listen at one path"
        for sock, file in got:
            with sock, socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                sock.settimeout(LIMIT)
                sock.accept()[0].close()
                file.remove()
        assert [name for name in os.listdir(place) if name != "s"] == []
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def test_a_directory_that_somebody_has_locked_does_not_keep_it_from_starting(place, monkeypatch):
    monkeypatch.setattr(listen_module, "LOCK_SECONDS", 0.2)
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        began = time.monotonic()
        sock, file = listen_unix(place / "s")
        assert time.monotonic() - began >= 0.2, "it did not look at the lock"
        file.remove()
        sock.close()
    finally:
        os.close(fd)


def test_the_directory_is_not_kept_locked(place):
    sock, file = listen_unix(place / "s")
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
        file.remove()
        sock.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_a_directory_without_locks_will_do(place, monkeypatch, code):
    def fail(fd, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    sock, file = listen_unix(place / "s")
    file.remove()
    sock.close()


def test_a_stale_socket_that_may_not_be_removed_is_refused(place, unix_listener, monkeypatch):
    unix_listener(place / "s").close()

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        with pytest.raises(cbwcore.ConfigError, match="/s is stale and cannot be replaced: Permission denied"):
            listen_unix(place / "s")
    assert (place / "s").is_socket()


def test_close_removes_its_own_socket_and_no_other(host, place, unix_listener):
    server = host.serve(socket=place / "s")
    server.close()
    assert not (place / "s").exists()
    server = host.serve(socket=place / "s")
    (place / "s").unlink()
    unix_listener(place / "s")
    server.close()
    assert (place / "s").is_socket()


def test_a_relative_path_means_the_directory_of_then(host, place, monkeypatch):
    monkeypatch.chdir(place)
    server = host.serve(socket="s")
    monkeypatch.chdir("/")
    assert server.uri("disk") == f"nbd+unix:///disk?socket={place}/s"
    server.close()
    assert not (place / "s").exists()


# ---- TCP ----


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":10809",
        "localhost:nbd",
        "localhost:65536",
        "localhost:-1",
        "::1:10809",
        "[::1]",
        "[]:1",
        "a b:1",
        "localhost:1:2",
        "localhost:1 ",
        "..:1",
        "localhost:\u0661",
        b"localhost:1",
        10809,
        None,
    ],
    ids=repr,
)
def test_an_address_that_is_none_is_refused(unchanged, text):
    with unchanged(), pytest.raises(cbwcore.ConfigError) as refused:
        listen_tcp(text)
    assert repr(text) in str(refused.value)


def test_all_addresses_of_a_name_have_one_port(monkeypatch):
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: both)
    sockets = listen_tcp("localhost:0")
    with contextlib.ExitStack() as undo:
        for sock in sockets:
            undo.enter_context(sock)
        names = [sock.getsockname()[:2] for sock in sockets]
        has_ipv6 = os.path.exists("/proc/net/if_inet6") and " lo" in Path("/proc/net/if_inet6").read_text()
        assert [host for host, _ in names] == (["127.0.0.1", "::1"] if has_ipv6 else ["127.0.0.1"])
        assert len({port for _, port in names}) == 1
        assert all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) for sock in sockets)


def test_an_address_that_is_not_here_is_left_out_unless_it_is_the_only_one(monkeypatch):
    elsewhere = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [elsewhere, here])
    (sock,) = listen_tcp("name:0")
    sock.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [elsewhere])
    with pytest.raises(cbwcore.ConfigError, match="Cannot assign requested address"):
        listen_tcp("name:0")


def test_a_free_port_is_looked_for_until_all_addresses_have_it(monkeypatch):
    taken, tries = [], []
    listen_at = listen_module.listen_at

    def second_is_taken(address, port):
        tries.append(port)
        if len(tries) < 6 and len(tries) % 2 == 0:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        taken.append(listen_at(address, port))
        return taken[-1]

    monkeypatch.setattr(listen_module, "listen_at", second_is_taken)
    two = [Address(socket.AF_INET, ("127.0.0.1", 0)), Address(socket.AF_INET, ("127.0.0.2", 0))]
    monkeypatch.setattr(listen_module, "resolve", lambda text: two)
    sockets = listen_tcp("name:0")
    assert len(tries) == 6
    assert sockets == taken[-2:]
    assert [sock.fileno() for sock in taken[:-2]] == [-1] * 2, "a socket of a try before is open"
    for sock in sockets:
        sock.close()


def test_a_port_in_use_is_refused(unchanged):
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = f"127.0.0.1:{other.getsockname()[1]}"
        with unchanged(), pytest.raises(cbwcore.ConfigError, match=f"{text}.*in use"):
            NbdServer(listen=text)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("fe80::1%lo", False),
    ],
)
def test_is_local(host, local):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert is_local(Address(family, (host, 1))) is local


def test_tcp_serves_and_says_where(host):
    server = host.serve(listen="127.0.0.1:0")
    name, port = server.uri("disk").removeprefix("nbd://").removesuffix("/disk").split(":")
    assert name == "127.0.0.1"
    client = host.open((name, int(port)))
    assert client.read(5, 100) == server.disk.t0[5:105]
    assert server.connections == 1


def test_tcp_options():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        sock, _ = listener.accept()
        with sock:
            service_module.prepare(sock)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@pytest.mark.parametrize("listens", ["name", "given"])
@pytest.mark.parametrize("tls", [None, "allow"])
def test_other_machines_are_not_let_in_without_tls(place, certificates, unchanged, tls, listens):
    config = TlsConfig(certificates, required=False) if tls else None
    with socket.create_server(("0.0.0.0", 0)) as given:
        where = {"listen": ANYWHERE} if listens == "name" else {"sockets": [given]}
        with (
            unchanged(),
            pytest.raises(cbwcore.ConfigError, match=r"0\.0\.0\.0:\d+ can be reached from other machines"),
        ):
            NbdServer(**where, tls=config, socket=place / "s")
        assert given.fileno() >= 0, "a socket that was refused is the caller's"


# ---- sockets that are open already ----


def test_given_sockets_are_served_and_closed(host, unix_listener):
    path = host.path()
    listener = unix_listener(path)
    server = host.serve(sockets=[listener])
    assert server.uris == (f"nbd+unix:///disk?socket={path}",)
    assert host.open(path).size == server.disk.size
    server.close()
    assert listener.fileno() == -1
    assert Path(path).is_socket(), "the file is whose socket it was"


def test_a_given_socket_that_others_have_too_goes_on_listening(host, unix_listener):
    """As systemd does, to start the server again when the next client comes."""
    path = host.path()
    with unix_listener(path).dup() as kept:
        server = host.serve(sockets=[kept.dup()])
        host.open(path)
        server.close()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            kept.setblocking(True)
            kept.accept()[0].close()


def connected():
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: socket.socket(socket.AF_UNIX), "does not listen"),
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "no unix or TCP stream socket"),
        (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), "no unix or TCP stream socket"),
        (connected, "does not listen"),
        (lambda: 3, "a int, not a socket"),
    ],
    ids=["not listening", "UDP", "seqpacket", "connected", "number"],
)
def test_a_given_socket_that_does_not_listen_is_refused(place, make, text):
    sock = make()
    with pytest.raises(cbwcore.ConfigError, match=rf"sockets\[0\] .*{text}"):
        NbdServer(sockets=[sock], socket=place / "s")
    assert os.listdir(place) == []
    if isinstance(sock, socket.socket):
        assert sock.fileno() >= 0
        sock.close()


def test_a_closed_socket_is_refused():
    sock = socket.socket(socket.AF_UNIX)
    sock.close()
    with pytest.raises(cbwcore.ConfigError, match=r"sockets\[0\] is no open socket"):
        NbdServer(sockets=[sock])


ACTIVATE = """
import json, os, socket, sys
from cbwcore.errors import ConfigError
from cbwcore.nbd.listen import activated_sockets
case, path = sys.argv[1:]
high = 50
listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
tcp = socket.create_server(("127.0.0.1", 0))
os.dup2(listener.fileno(), high); listener.close()
os.dup2(tcp.fileno(), high + 1); tcp.close()
extra = {"datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "quiet": lambda: socket.socket(),
         "file": lambda: open(os.devnull)}
os.closerange(3, high)
os.dup2(high, 3); os.dup2(high + 1, 4)
if case in extra:
    made = extra[case](); os.dup2(made.fileno(), 20); made.close(); os.dup2(20, 5)
os.closerange(6 if case in extra else 5, 100)
os.environ["LISTEN_PID"] = "1" if case == "other" else str(os.getpid())
os.environ["LISTEN_FDS"] = {"bad": "two", "none": "0", "huge": "99999", "signed": "-1", "two": "2"}.get(case, "3")
os.environ["LISTEN_FDNAMES"] = "a:b"
if case == "unset":
    del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"]
try:
    sockets = activated_sockets()
    told = [[s.fileno(), os.get_inheritable(s.fileno()), s.family == socket.AF_UNIX] for s in sockets]
except ConfigError as e:
    told = str(e)
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps([told, [fd for fd in range(3, 8) if is_open(fd)], left]))
"""


@pytest.mark.parametrize(
    ("case", "told", "left_open"),
    [
        ("two", [[3, False, True], [4, False, False]], [3, 4]),
        ("none", [], [3, 4]),
        ("other", [], [3, 4]),
        ("unset", [], [3, 4]),
        ("bad", "LISTEN_FDS is 'two'", [3, 4]),
        ("huge", "LISTEN_FDS is '99999'", [3, 4]),
        ("signed", "LISTEN_FDS is '-1'", [3, 4]),
        ("missing", "descriptor 5 of LISTEN_FDS is no socket: Bad file descriptor", []),
        ("file", "descriptor 5 of LISTEN_FDS is no socket: Socket operation on non-socket", [5]),
        ("datagram", "descriptor 5 of LISTEN_FDS is no unix or TCP stream socket", []),
        ("quiet", "descriptor 5 of LISTEN_FDS is a socket that does not listen", []),
    ],
)
def test_activated_sockets(run_python, place, case, told, left_open):
    done = run_python(ACTIVATE, case, place / "s")
    assert done.stderr == ""
    got, still_open, variables = json.loads(done.stdout)
    assert got == told if isinstance(told, list) else got.startswith(told)
    assert still_open == left_open
    assert variables == []


def test_no_socket_is_activated_here(monkeypatch):
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert activated_sockets() == []


# ---- telling systemd ----


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_notify(place, monkeypatch, abstract):
    name = f"@cbwcore-test-{os.getpid()}" if abstract else str(place / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        listen_module.notify_ready()
        notify("STOPPING=1")
        manager.settimeout(LIMIT)
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "vsock:2:1", "x" * 200, "@"])
def test_a_manager_that_cannot_be_told_is_logged(monkeypatch, log, name):
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify("READY=1")
    assert name in log(logging.WARNING)
    assert "READY=1" in log(logging.WARNING)


def test_no_manager_is_told_nothing(monkeypatch, log):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    assert log() == ""


# ---- peers ----


def test_peers():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()
        assert peer_name(ours) == f"process {os.getpid()} of user {os.geteuid()}"
    assert peer_name(ours).startswith("a peer that has gone")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        assert peer_uid(client) is None
        assert peer_name(client) == f"127.0.0.1:{listener.getsockname()[1]}"


def test_only_some_users_may_connect(host, log):
    server = host.serve(allow_uids={os.geteuid() + 1})
    assert host.connect(server).dropped() == b"", "something was said to a stranger"
    assert f"refused: user {os.geteuid()} may not connect" in log(logging.WARNING)
    server = host.serve(allow_uids=[os.geteuid() + 1, os.geteuid()])
    assert host.open(server).size > 0


def test_allow_uids_lets_no_tcp_peer_in(host, log):
    server = host.serve(listen="127.0.0.1:0", allow_uids={os.geteuid()})
    port = int(server.uri("disk").split(":")[2].split("/")[0])
    assert host.connect(("127.0.0.1", port)).dropped() == b""
    assert "refused: only some users" in log(logging.WARNING)


@pytest.mark.parametrize("uids", [[-1], ["0"], [True], [1.0], [None], [2**32], 5, "0"], ids=repr)
def test_users_are_numbers(place, unchanged, uids):
    with unchanged(), pytest.raises(cbwcore.ConfigError, match="allow_uids"):
        NbdServer(socket=place / "s", allow_uids=uids)


@pytest.mark.parametrize("options", [{"limits": None}, {"limits": {}}, {"tls": True}, {"tls": "/etc/pki"}], ids=str)
def test_limits_and_tls_are_what_they_must_be(place, unchanged, options):
    with unchanged(), pytest.raises(cbwcore.ConfigError, match="no NbdLimits or TlsConfig"):
        NbdServer(socket=place / "s", **options)


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


def test_a_callback_may_close_the_server(host):
    server, done = host.serve(), threading.Event()

    def end(snapshot):
        server.close()
        done.set()

    breaking(host, server, on_break=end)
    client = host.open(server)
    assert client.call(nbd.WRITE, 0, 0, WRITTEN).error == 0
    assert done.wait(LIMIT)
    assert client.dropped() == b""
    server.close()
    until(lambda: not nbd_threads(), "the end of its threads")


def test_a_callback_may_remove_the_export(host):
    server, done = host.serve(), threading.Event()

    def end(snapshot):
        server.remove_export("disk")
        done.set()

    breaking(host, server, on_break=end)
    client = host.open(server)
    assert client.call(nbd.WRITE, 0, 0, WRITTEN).error == 0
    assert done.wait(LIMIT)
    assert client.dropped() == b""
    server.add_export("disk", server.disk)
    assert host.open(server).size > 0


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
    clients = [host.open(server), host.connect(server).hello(), open_tls(host, ("127.0.0.1", port), client_context)]
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


# ---- TLS ----


def openssl(home, *arguments):
    done = subprocess.run(["openssl", *arguments], cwd=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory with an authority, and certificates for a server and a client."""
    need("openssl")
    home = tmp_path_factory.mktemp("tls")
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(home, *new, "-x509", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
    for name in ("server", "client"):
        openssl(home, *new, "-subj", "/CN=localhost", "-keyout", f"{name}-key.pem", "-out", f"{name}.req")
        (home / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        signing = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "names"]
        openssl(home, "x509", "-req", "-days", "2", "-in", f"{name}.req", *signing, "-out", f"{name}-cert.pem")
    return home


@pytest.fixture
def client_context(certificates):
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


def open_tls(host, where, context):
    client = host.connect(where).hello().starttls(context, "localhost")
    assert client.go("disk").error == 0
    return client


def test_tls_end_to_end(host, certificates, client_context):
    server = host.serve(tls=TlsConfig(certificates))
    assert server.uri("disk").startswith("nbds+unix:///disk?")
    with Client(server.path) as plain:
        assert plain.hello().go("disk").error == nbd.ERR_TLS_REQD
    client = open_tls(host, server, client_context)
    data = bytes(range(256)) * 512
    client.ok(nbd.WRITE, 99_999, 0, data)
    assert server.disk.pread(len(data), 99_999) == data
    assert client.read(0, 4 * CLUSTER) == server.disk.pread(4 * CLUSTER, 0)
    client.disconnect()
    until(lambda: server.connections == 0, "it ended")


def test_tls_with_programs_of_others(host, certificates):
    need("nbdcopy")
    server = host.serve(listen="localhost:0", tls=TlsConfig(certificates))
    assert server.uri("disk").startswith("nbds://localhost:")
    uri = f"{server.uri('disk')}?tls-certificates={certificates}"
    image = host.rig.folder / "copy.img"
    done = subprocess.run(["nbdcopy", uri, image], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert image.read_bytes() == server.disk.t0


def test_tls_from_other_machines_may_listen_anywhere(host, certificates):
    server = host.serve(listen=ANYWHERE, tls=TlsConfig(certificates))
    assert server.uri("disk").startswith("nbds://0.0.0.0:")


def test_tls_that_is_allowed_serves_both(host, certificates, client_context):
    server = host.serve(tls=TlsConfig(certificates, required=False))
    assert server.uri("disk").startswith("nbd+unix:")
    plain, secret = host.open(server), open_tls(host, server, client_context)
    secret.ok(nbd.WRITE, 0, 0, WRITTEN)
    assert plain.read(0, 6) == WRITTEN[:6]
    assert server.connections == 2


@pytest.mark.parametrize("end", ["close", "remove_export"])
def test_tls_requests_in_flight_are_answered_at_the_end(host, certificates, client_context, end):
    server = host.serve(tls=TlsConfig(certificates))
    idle, client = open_tls(host, server, client_context), open_tls(host, server, client_context)
    plan = host.rig.plan(server.disk)
    plan.stall("pread")
    handle = client.request(nbd.READ, 0, 3 * CLUSTER)
    stalled(plan)
    ending = host.rig.run(server.close) if end == "close" else host.rig.run(server.remove_export, "disk")
    assert idle.dropped() == b""
    assert not ending.done, "it did not wait for the other"
    plan.release()
    assert bytes(client.reply(handle).data) == server.disk.t0[: 3 * CLUSTER]
    assert client.dropped() == b""
    ending.result()


def test_close_does_not_wait_for_a_tls_handshake(host, certificates):
    server = host.serve(tls=TlsConfig(certificates), limits={"handshake_seconds": 3600.0})
    client = host.connect(server).hello()
    assert client.option(nbd.STARTTLS).error == 0
    host.rig.run(server.close).result(5)
    assert client.dropped() == b""
    assert nbd_threads() == []


def test_a_tls_client_that_goes_leaves_nothing(host, certificates, client_context, unchanged):
    server = host.serve(tls=TlsConfig(certificates))
    open_tls(host, server, client_context).sock.close()
    until(lambda: server.connections == 0 and len(nbd_threads()) == 1, "it is gone")
    with unchanged(server.disk):
        for _ in range(3):
            with Client(server.path) as client:
                client.hello().starttls(client_context, "localhost").go("disk")
                client.request(nbd.READ, 0, CLUSTER)
            until(lambda: server.connections == 0 and len(nbd_threads()) == 1, "it is gone")
        gc.collect()
