"""The NBD server: disks and snapshots for NBD clients, by unix sockets, TCP and TLS."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Collection, Iterable
from typing import Self
from urllib.parse import quote

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.disk import Disk
from cbwcore.errors import ConfigError
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.limits import NbdLimits
from cbwcore.nbd.listen import (
    Address,
    SocketFile,
    check_listening,
    host_and_port,
    is_local,
    listen_tcp,
    listen_unix,
    split_address,
)
from cbwcore.nbd.service import Service
from cbwcore.nbd.tls import TlsConfig
from cbwcore.snapshot import Snapshot

__all__ = ["NbdServer"]


class NbdServer:
    """Serves disks and snapshots to NBD clients, in threads of its own, until `close`. A context manager, thread-safe.

    ``socket``: a path, for this user alone (mode 0600). ``listen``: "HOST:PORT" or "[::1]:10809", on all addresses of
    the host; port 0 is any free one. ``sockets``: listening ones that are open already; the server closes them. It may
    listen in all these places, or in none, for `serve_connection`. ``tls``: see `TlsConfig`. Whoever could connect from
    another machine must use TLS. ``allow_uids``: the users that may connect, by unix sockets alone.
    ``start_serving=False``: clients wait until `start_serving`, so that the first finds all exports.

    ConfigError: something was refused, and nothing was opened, created or changed.
    """

    def __init__(
        self,
        *,
        socket: str | os.PathLike[str] | None = None,
        listen: str | None = None,
        sockets: Iterable[socket.socket] = (),
        tls: TlsConfig | None = None,
        allow_uids: Collection[int] | None = None,
        limits: NbdLimits = NbdLimits(),  # noqa: B008  (it is immutable)
        start_serving: bool = True,
    ) -> None:
        if not isinstance(limits, NbdLimits) or not isinstance(tls, TlsConfig | None):
            raise ConfigError(f"limits {limits!r} or tls {tls!r} is no NbdLimits or TlsConfig")
        self._exports = Exports()
        self._scheme = "nbds" if tls is not None and tls.required else "nbd"
        uids = check_uids(allow_uids)
        given = list(sockets)
        with contextlib.ExitStack() as undo:
            listeners, files, places = open_listeners(socket, listen, given, undo)
            for sock in listeners:
                check_exposure(sock, tls)
            self._places = places
            self._service = Service(self._exports, listeners, files, tls=tls, allow_uids=uids, limits=limits)
            undo.pop_all()
        if start_serving:
            self.start_serving()

    def __repr__(self) -> str:
        state = "closed" if self._over else f"{self.connections} connections"
        return f"<NbdServer {', '.join(self._places) or 'that does not listen'}: {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not hasattr(self, "_service") or self._over:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
        if not sys.is_finalizing():  # or the lock's owner may be a thread that never runs again
            self._service.close_unattended()

    def start_serving(self) -> None:
        """Let clients in; again does nothing. ValueError after close."""
        self._check_open()
        self._service.start_accepting()

    def add_export(
        self,
        name: str,
        source: Disk | Snapshot,
        *,
        writable: bool = False,
        bitmaps: Iterable[DirtyBitmap | str] = (),
        discard: bool = False,
        description: str = "",
    ) -> None:
        """Export a disk or a snapshot, at once; the first one is the default export, too.

        ``bitmaps``: shown as qemu:dirty-bitmap:NAME. ``discard``: clients may give up parts of a snapshot by TRIM.
        Keep the source open until `remove_export` or `close`. ConfigError, ValueError after close."""
        self._check_open()
        export = Export(name, source, writable=writable, bitmaps=bitmaps, discard=discard, description=description)
        self._exports.add(export)

    def remove_export(self, name: str) -> None:
        """End an export: no client finds it any more, those that use it finish what is in flight and are disconnected.

        Returns when none is left. ConfigError where there is none of that name; ValueError after close."""
        self._check_open()
        self._service.remove_export(name)

    @property
    def exports(self) -> tuple[str, ...]:
        """The names, the default export's first."""
        return self._exports.names()

    def uri(self, name: str) -> str:
        """The NBD URI of an export, where the server listens first. ConfigError."""
        if self._exports.find(name) is None:
            raise ConfigError(f"there is no export {name!r}")
        if not self._places:
            raise ConfigError("this server does not listen, so that there is no URI")
        return self._uris_of(name)[0]

    @property
    def uris(self) -> tuple[str, ...]:
        """The NBD URIs of all exports, wherever the server listens."""
        return tuple(uri for name in self.exports for uri in self._uris_of(name))

    def _uris_of(self, name: str) -> tuple[str, ...]:
        return tuple(self._uri(place, name) for place in self._places)

    def _uri(self, place: str, name: str) -> str:
        quoted = quote(name, safe="")
        if place.startswith(("/", "\0")):
            return f"{self._scheme}+unix:///{quoted}?socket={quote(os.fsencode(place))}"
        return f"{self._scheme}://{place}/{quoted}"

    @property
    def connections(self) -> int:
        """Clients that negotiate or are served."""
        return self._service.connections

    @property
    def idle_seconds(self) -> float:
        """Since the last connection ended, or since `start_serving`; 0 while there is one. ValueError after close."""
        self._check_open()
        return self._service.idle_seconds

    def serve_connection(self, sock: socket.socket) -> None:
        """Serve the client at the other end of a connected stream socket, in this thread, until it ends.

        The limits, ``allow_uids`` and TLS hold as for all; what goes wrong is logged. The socket is closed then.
        ConfigError, ValueError after close: it was not touched."""
        self._check_open()
        if sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise ConfigError(f"{sock!r} is no unix or TCP stream socket")
        connection = self._service.add(sock)
        if connection is not None:
            connection.run()

    def close(self) -> None:
        """Stop listening, let the clients' requests in flight finish, disconnect them. Again does nothing.

        Clients that are negotiating are cut off. All of it is over when this returns, but for what runs in a callback
        that calls it."""
        if not self._service.forked:
            self._service.close()

    @property
    def _over(self) -> bool:
        return self._service.closing or self._service.forked

    def _check_open(self) -> None:
        if self._service.forked:
            raise ValueError("this NBD server was made before a fork and is not usable in the child")
        if self._service.closing:
            raise ValueError("this NBD server is closed")


def check_uids(allow_uids: Collection[int] | None) -> frozenset[int] | None:
    """The users that may connect. ConfigError."""
    if allow_uids is None:
        return None
    if not isinstance(allow_uids, Collection):
        raise ConfigError(f"allow_uids {allow_uids!r} is no collection of users' numbers")
    for uid in allow_uids:
        if not isinstance(uid, int) or isinstance(uid, bool) or not 0 <= uid < 2**32:
            raise ConfigError(f"allow_uids: {uid!r} is no user's number")
    return frozenset(allow_uids)


def check_exposure(at: socket.socket | Address, tls: TlsConfig | None) -> None:
    """ConfigError where a client on another machine could connect without TLS."""
    if is_local(at) or (tls is not None and tls.required):
        return
    where = host_and_port(*(at.sockaddr if isinstance(at, Address) else at.getsockname())[:2])
    missing = "TLS" if tls is None else "TLS that is required"
    raise ConfigError(f"{where} can be reached from other machines: listen on a loopback address, or with {missing}")


def open_listeners(
    path: str | os.PathLike[str] | None, address: str | None, given: list[socket.socket], undo: contextlib.ExitStack
) -> tuple[list[socket.socket], list[SocketFile], list[str]]:
    """All listening sockets, the files of those that were made, and the places for URIs. ConfigError."""
    listeners: list[socket.socket] = []
    files: list[SocketFile] = []
    places: list[str] = []
    for number, sock in enumerate(given):
        check_listening(sock, f"sockets[{number}]")
    if path is not None:
        sock, file = listen_unix(path)
        undo.callback(sock.close)
        undo.callback(file.remove)
        listeners.append(sock)
        files.append(file)
        places.append(file.path)
    if address is not None:
        made = listen_tcp(address)
        for sock in made:
            undo.callback(sock.close)
        listeners += made
        places.append(host_and_port(split_address(address)[0], made[0].getsockname()[1]))
    return [*listeners, *given], files, [*places, *map(place_of, given)]


def place_of(sock: socket.socket) -> str:
    """Where a socket listens, as it says itself."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return host_and_port(*name[:2])
    path = os.fsdecode(name)
    return path if path.startswith("\0") else os.path.abspath(path)
