"""Where the server listens and who may connect: unix sockets, TCP, sockets of systemd and others."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from pathlib import Path

import pytest
from engine_support import LIMIT

import cbwcore
from cbwcore.nbd import NbdServer, TlsConfig
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

ANYWHERE = "0.0.0.0:0"


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
