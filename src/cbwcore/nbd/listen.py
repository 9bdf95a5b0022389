"""Where clients come in: unix sockets, TCP, sockets that systemd hands over; who a peer is; telling systemd."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from cbwcore.errors import ConfigError

__all__ = [
    "Address",
    "SocketFile",
    "activated_sockets",
    "check_listening",
    "host_and_port",
    "is_local",
    "listen_tcp",
    "listen_unix",
    "notify",
    "notify_ready",
    "peer_name",
    "peer_uid",
    "resolve",
    "split_address",
]

logger = logging.getLogger(__name__)

MAX_UNIX_PATH = 107  # bytes: sun_path has 108, and one is for the NUL
OWNER_ONLY = 0o600
LOCK_SECONDS = 1.0  # the longest that a start waits for those of other servers
LOCK_POLL_SECONDS = 0.01
FIRST_ACTIVATED = 3  # SD_LISTEN_FDS_START
FREE_PORT_TRIES = 16
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

Path = str | os.PathLike[str]


class SocketFile(NamedTuple):
    """The file of a unix socket: its name, and which file that was when it was made."""

    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, path: str) -> SocketFile:
        """The file that has this name now. OSError."""
        status = os.lstat(path)
        return cls(path, status.st_dev, status.st_ino)

    def is_there(self) -> bool:
        """Whether the name is still this file's. A socket's inode number is not used again while it is open."""
        try:
            return SocketFile.of(self.path) == self
        except OSError:
            return False

    def remove(self) -> None:
        """Unlink the file, if it is still the same; whatever has taken its name stays."""
        if self.is_there():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


# ---- unix sockets ----


def listen_unix(path: Path) -> tuple[socket.socket, SocketFile]:
    """Listen at ``path`` for this user alone (mode 0600). A socket file there on which nobody listens is replaced.

    ConfigError: the path is too long, in use, no socket, or no file can be made there; nothing was changed."""
    where = check_unix_path(path)
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
        os.fchmod(sock.fileno(), OWNER_ONLY)  # Linux makes the file with this mode, less the umask: never a wider one
        with one_at_a_time(os.path.dirname(where)):
            if not bind_unix(sock, where):
                remove_stale(where)
                if not bind_unix(sock, where):
                    raise ConfigError(f"socket {where} is in use: another process has just made it")
            file = SocketFile.of(where)
            undo.callback(file.remove)
            os.chmod(where, OWNER_ONLY)
            sock.listen()
        undo.pop_all()
    return sock, file


@contextlib.contextmanager
def one_at_a_time(directory: str) -> Iterator[None]:
    """Keep other servers that start from taking for stale what does not listen yet, or is just being replaced.

    The lock is the directory's. Where it cannot be had, or whoever has it does not let go, it is done without."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not try_lock(fd) and time.monotonic() < end:
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Whether there is nothing to wait for: the lock is taken, or there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        logger.debug("the directory of a socket cannot be locked: %s", e)
    return True


def check_unix_path(path: Path) -> str:
    """The absolute path for a unix socket. ConfigError."""
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"socket path {text!r} is not a text of one or more characters without NUL")
    where = os.path.abspath(text)
    try:
        nbytes = len(os.fsencode(where))
    except UnicodeEncodeError:
        raise ConfigError(f"socket path {text!r} cannot be encoded") from None
    if nbytes > MAX_UNIX_PATH:
        raise ConfigError(f"socket path {where} has {nbytes} bytes, at most {MAX_UNIX_PATH} are possible")
    return where


def bind_unix(sock: socket.socket, where: str) -> bool:
    """Make the socket's file; False where there is something already. ConfigError."""
    try:
        sock.bind(where)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            return False
        raise ConfigError(f"socket {where} cannot be made: {e.strerror}") from e
    return True


def remove_stale(where: str) -> None:
    """Remove a socket file on which nobody listens. ConfigError for any other thing, which is left as it is."""
    try:
        if not stat.S_ISSOCK(os.lstat(where).st_mode):
            raise ConfigError(f"socket path {where} is in use: there is something that is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a listener whose backlog is full would let it wait
            probe.connect(where)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        unlink_stale(where)
        return
    except OSError as e:
        raise ConfigError(f"socket {where} is in use, as far as can be told: {e.strerror}") from e
    raise ConfigError(f"socket {where} is in use: another process listens on it")


def unlink_stale(where: str) -> None:
    """ConfigError where that is not allowed."""
    try:
        os.unlink(where)
    except FileNotFoundError:
        pass
    except OSError as e:
        raise ConfigError(f"socket {where} is stale and cannot be replaced: {e.strerror}") from e


# ---- TCP ----


class Address(NamedTuple):
    """Where to listen: an address family, and a numeric address as `socket.bind` takes it."""

    family: int
    sockaddr: tuple[Any, ...]

    def with_port(self, port: int) -> tuple[Any, ...]:
        """The socket address, with another port."""
        return (self.sockaddr[0], port, *self.sockaddr[2:])


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[::1]:PORT". ConfigError."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", text) if isinstance(text, str) else None
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"address {text!r} is not HOST:PORT or [IPV6]:PORT with a port from 0 to 65535")
    return match[1] or match[2], int(match[3])


def resolve(text: str) -> list[Address]:
    """All the addresses of "HOST:PORT". ConfigError."""
    host, port = split_address(text)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no host name"
        raise ConfigError(f"address {text!r}: {why}") from e
    return list(dict.fromkeys(Address(family, sockaddr) for family, _, _, _, sockaddr in found))


def listen_tcp(text: str) -> list[socket.socket]:
    """Listen on all addresses of "HOST:PORT" that this machine has; port 0 is one free port for all. ConfigError."""
    addresses = resolve(text)
    wanted = addresses[0].sockaddr[1]
    for _ in range(FREE_PORT_TRIES):
        try:
            return listen_at_all(addresses, wanted)
        except OSError as e:
            if wanted or e.errno != errno.EADDRINUSE:  # the first address had that port free, another had not
                raise ConfigError(f"address {text!r} cannot be listened on: {e.strerror}") from e
    raise ConfigError(f"address {text!r}: no port is free on all of its {len(addresses)} addresses")


def listen_at_all(addresses: list[Address], port: int) -> list[socket.socket]:
    """A listening socket for each; a name may have addresses that are not here, if one is. OSError."""
    sockets: list[socket.socket] = []
    elsewhere: OSError | None = None
    with contextlib.ExitStack() as undo:
        for address in addresses:
            try:
                sock = listen_at(address, port)
            except OSError as e:
                if e.errno not in NO_SUCH_ADDRESS:
                    raise
                elsewhere = e
                continue
            undo.callback(sock.close)
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets and elsewhere is not None:
            raise elsewhere
        undo.pop_all()
    return sockets


def listen_at(address: Address, port: int) -> socket.socket:
    """Listen at one address. OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the name's IPv4 address has its own socket
        sock.bind(address.with_port(port))
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


def is_local(where: socket.socket | Address) -> bool:
    """Whether only programs of this machine can connect: unix sockets, and the loopback interface's addresses."""
    if where.family == socket.AF_UNIX:
        return True
    host = where.getsockname()[0] if isinstance(where, socket.socket) else where.sockaddr[0]
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


# ---- peers ----


def peer_uid(sock: socket.socket) -> int | None:
    """The user of a unix socket's other end (when it connected); None for TCP. OSError."""
    return credentials(sock)[1] if sock.family == socket.AF_UNIX else None


def peer_name(sock: socket.socket) -> str:
    """Who is at the other end, for the log."""
    try:
        if sock.family == socket.AF_UNIX:
            pid, uid = credentials(sock)
            return f"process {pid} of user {uid}"
        host, port = sock.getpeername()[:2]
    except OSError as e:
        return f"a peer that has gone ({e.strerror})"
    return host_and_port(host, port)


def credentials(sock: socket.socket) -> tuple[int, int]:
    """(process, user) at the other end of a unix socket."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def host_and_port(host: str, port: int) -> str:
    """As `split_address` takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---- systemd ----


def activated_sockets() -> list[socket.socket]:
    """The listening sockets that systemd, or whoever started this process, hands over (sd_listen_fds); none if none.

    The environment variables are for this process alone and removed. ConfigError where they or a descriptor are wrong;
    then the descriptors are closed."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    if not re.fullmatch("[0-9]{1,4}", count):
        raise ConfigError(f"LISTEN_FDS is {count!r}, no number of descriptors")
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for fd in range(FIRST_ACTIVATED, FIRST_ACTIVATED + int(count)):
            sockets.append(activated_socket(fd))
            undo.callback(sockets[-1].close)
        undo.pop_all()
    return sockets


def activated_socket(fd: int) -> socket.socket:
    """The listening stream socket that a descriptor must be. ConfigError."""
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as e:
        raise ConfigError(f"descriptor {fd} of LISTEN_FDS is no socket: {e.strerror}") from e
    try:
        check_listening(sock, f"descriptor {fd} of LISTEN_FDS")
    except BaseException:
        sock.close()
        raise
    return sock


def check_listening(sock: socket.socket, what: str) -> None:
    """ConfigError for what is not a listening stream socket, unix or TCP."""
    if not isinstance(sock, socket.socket):
        raise ConfigError(f"{what} is a {type(sock).__name__}, not a socket")
    if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"{what} is no unix or TCP stream socket")
    try:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as e:
        raise ConfigError(f"{what} is no open socket: {e.strerror}") from e
    if not listens:
        raise ConfigError(f"{what} is a socket that does not listen")


def notify_ready() -> None:
    """Tell systemd that clients can come."""
    notify("READY=1")


def notify(state: str) -> None:
    """Tell the service manager (sd_notify), if there is one that wants it; what fails is logged."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    path = f"\0{where[1:]}" if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), path)
    except OSError as e:
        logger.warning("NOTIFY_SOCKET %s was not told %s: %s", where, state, e.strerror or e)
