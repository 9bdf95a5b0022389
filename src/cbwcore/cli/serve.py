"""``cbwcore serve``: a disk, and a snapshot of it, for NBD clients, until a signal, or until nobody wants it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import msgspec

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.cli.arguments import UsageError, as_usage, parse_seconds, parse_size
from cbwcore.cli.output import console, print_json, size_text
from cbwcore.disk import Disk
from cbwcore.engines import ENGINES, choose_engine
from cbwcore.errors import StateError
from cbwcore.nbd.limits import NbdLimits
from cbwcore.nbd.listen import activated_sockets, notify, notify_ready, resolve, split_address
from cbwcore.nbd.server import NbdServer, check_exposure, check_uids
from cbwcore.nbd.tls import TlsConfig
from cbwcore.options import SnapshotOptions, check_name
from cbwcore.policy import OnCbwError
from cbwcore.snapshot import Wanted, take_snapshots

__all__ = ["add_command"]

logger = logging.getLogger(__name__)

DISK = "disk"  # the name of the disk's export
SNAPSHOT = "snapshot"  # and of the snapshot's
ENDING = (signal.SIGTERM, signal.SIGINT)
OF_SNAPSHOTS = ("target", "target_limit", "name", "cluster_size", "on_cbw_error", "cbw_timeout", "discard")
PIECE = 1 << 16  # bytes that a pipe is read by


class ExportFacts(msgspec.Struct, frozen=True):
    """One export, and where clients find it."""

    name: str
    read_only: bool
    uris: tuple[str, ...]


class ServeFacts(msgspec.Struct, frozen=True):
    """What ``cbwcore serve --json`` prints, in one line, when clients can come. Size in bytes."""

    disk: str
    size: int
    target: str | None
    pid: int
    exports: list[ExportFacts]


# ---- the command line ----


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "serve a disk, and a snapshot of it, to NBD clients"
    parser = commands.add_parser(
        "serve",
        help=about,
        description=f"{about[0].upper()}{about[1:]}, until SIGTERM or SIGINT.",
        epilog="The disk's export is called disk. Without --socket, --listen and --stdio the sockets that systemd "
        "hands over are used. A SIZE is in bytes, or ends in K, M, G or T.",
    )
    parser.add_argument("disk", metavar="DISK", help="a file or block device")
    add_places(parser)
    add_disk_options(parser)
    add_snapshot_options(parser)
    parser.add_argument("--json", action="store_true", help="print the facts as one line of JSON when clients can come")
    parser.set_defaults(run=run)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where clients come from, and which, and for how long."""
    group = parser.add_argument_group("clients")
    place = group.add_mutually_exclusive_group()
    place.add_argument("--socket", metavar="PATH", help="listen on a unix socket, for this user alone")
    place.add_argument("--listen", metavar="HOST:PORT", help="listen on TCP; without TLS on loopback addresses only")
    place.add_argument("-s", "--stdio", action="store_true", help="serve the one client on standard input and output")
    group.add_argument("--tls-dir", metavar="DIR", help="TLS with DIR's ca-cert.pem, server-cert.pem, server-key.pem")
    group.add_argument("--tls", choices=("require", "allow"), help="whether clients must use it (default: require)")
    group.add_argument(
        "--allow-uid", metavar="UID", type=int, action="append", help="only this user may connect; may be repeated"
    )
    group.add_argument("--max-connections", metavar="N", type=int, help="clients at a time (default: 100)")
    group.add_argument(
        "--idle-exit", metavar="SECONDS", type=parse_seconds, help="end when there was no client for so long"
    )
    group.add_argument("--pid-file", metavar="PATH", help="holds the process number while clients can come")


def add_disk_options(parser: argparse.ArgumentParser) -> None:
    """Of the disk."""
    group = parser.add_argument_group("disk")
    group.add_argument("--read-only", action="store_true", help="clients may not write")
    group.add_argument("--direct", action="store_true", help="use O_DIRECT")
    group.add_argument("--io", choices=ENGINES, default="auto", help="the I/O engine (default: auto)")
    group.add_argument(
        "--bitmap",
        metavar="NAME",
        action="append",
        default=[],
        help="show what was written as qemu:dirty-bitmap:NAME, and make it if it is not there; may be repeated",
    )
    group.add_argument(
        "--bitmaps", metavar="PATH", help="the file of the persistent bitmaps (default: DISK.cbw-bitmaps beside a file)"
    )


def add_snapshot_options(parser: argparse.ArgumentParser) -> None:
    """Of the snapshot; None where they are not given."""
    group = parser.add_argument_group("snapshot")
    group.add_argument("--no-snapshot", action="store_true", help="export the disk alone")
    group.add_argument("--name", help=f"name of its export (default: {SNAPSHOT})")
    group.add_argument(
        "--target", metavar="PATH", help="where old data goes (default: an unnamed file beside the disk)"
    )
    group.add_argument("--target-limit", metavar="SIZE", type=parse_size, help="bytes that the target may take")
    group.add_argument("--cluster-size", metavar="SIZE", type=parse_size, help="bytes copied at least (default: 64K)")
    group.add_argument(
        "--on-cbw-error", choices=[str(p) for p in OnCbwError], help="who pays where old data cannot be copied"
    )
    group.add_argument("--cbw-timeout", metavar="S", type=float, help="seconds that a write waits for it at most")
    group.add_argument("--discard", action="store_true", default=None, help="clients may give up parts of it by TRIM")


def check_usage(args: argparse.Namespace) -> None:
    """What the parser does not see. UsageError."""
    if args.no_snapshot:
        for name in OF_SNAPSHOTS:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for the snapshot, and there is --no-snapshot")
    if args.tls is not None and args.tls_dir is None:
        raise UsageError("--tls needs --tls-dir, where the certificates are")
    if args.listen is not None and args.allow_uid is not None:
        raise UsageError("--allow-uid is for unix sockets: whose a TCP connection is cannot be told")
    if args.stdio and args.idle_exit is not None:
        raise UsageError("--idle-exit is for sockets that are listened on, and there is --stdio")
    if args.stdio and args.json:
        raise UsageError("--json prints to standard output, and there is --stdio")
    if args.name == DISK:
        raise UsageError(f"--name {DISK} is the name of the disk's export")
    if len(set(args.bitmap)) < len(args.bitmap):
        raise UsageError("--bitmap: two bitmaps cannot have one name")
    if args.stdio and not (stat.S_ISSOCK(mode_of(0)) or (stat.S_ISFIFO(mode_of(0)) and stat.S_ISFIFO(mode_of(1)))):
        raise UsageError("--stdio: standard input and output are neither a socket nor two pipes")
    with as_usage():
        choose_engine(args.io)
        check_uids(args.allow_uid)
        for name in args.bitmap:
            check_name(name)
        if args.listen is not None:
            split_address(args.listen)


def snapshot_options(args: argparse.Namespace) -> SnapshotOptions | None:
    """None with --no-snapshot. UsageError."""
    if args.no_snapshot:
        return None
    given = {name: getattr(args, name) for name in OF_SNAPSHOTS if name != "discard"}
    with as_usage():
        return SnapshotOptions(**{"name": SNAPSHOT} | {name: v for name, v in given.items() if v is not None})


def server_limits(args: argparse.Namespace) -> NbdLimits:
    """UsageError."""
    with as_usage():
        return NbdLimits() if args.max_connections is None else NbdLimits(connections=args.max_connections)


def tls_config(args: argparse.Namespace) -> TlsConfig | None:
    """None without --tls-dir. ConfigError; UsageError where TLS is a must and not there."""
    tls = None if args.tls_dir is None else TlsConfig(args.tls_dir, required=args.tls != "allow")
    for address in () if args.listen is None else resolve(args.listen):
        with as_usage():
            check_exposure(address, tls)
    return tls


# ---- the command ----


def run(args: argparse.Namespace) -> int:
    """Serve, to the end."""
    check_usage(args)
    options, limits = snapshot_options(args), server_limits(args)
    tls = tls_config(args)
    with log_to_stderr(), Ending() as ending, contextlib.ExitStack() as undo:
        pid_file = PidFile(args.pid_file)
        undo.callback(pid_file.remove)
        server = undo.enter_context(make_server(args, tls, limits))  # its place is taken before the disk is touched
        disk = undo.enter_context(open_disk(args))
        if not args.read_only:
            undo.callback(disk.flush)
        export(args, server, disk, options)
        undo.callback(server.close)
        if args.stdio:
            undo.enter_context(Stdio(server, limits, ending))
        server.start_serving()
        pid_file.write()
        if args.json or args.socket is not None or args.listen is not None:
            print_facts(args, server, disk)  # else stdout is for others: nbdcopy [ cbwcore serve ... ] - has its own
        undo.callback(notify, "STOPPING=1")  # at the end this comes first
        notify_ready()
        wait_for_end(server, ending, args.idle_exit)
    return 0


def open_disk(args: argparse.Namespace) -> Disk:
    """The disk; its persistent bitmaps record from here on. ConfigError, StateError, OSError."""
    return Disk(args.disk, direct=args.direct, io=args.io, read_only=args.read_only, bitmaps=args.bitmaps)


def make_server(args: argparse.Namespace, tls: TlsConfig | None, limits: NbdLimits) -> NbdServer:
    """A server that lets nobody in yet. ConfigError, UsageError."""
    listens_itself = args.socket is not None or args.listen is not None
    sockets = [] if listens_itself or args.stdio else activated_sockets()
    if not (listens_itself or args.stdio or sockets):
        raise UsageError("where is it to serve? --socket, --listen and --stdio say it, or systemd with LISTEN_FDS")
    with contextlib.ExitStack() as undo:
        for sock in sockets:
            undo.enter_context(sock)
        server = NbdServer(
            socket=args.socket,
            listen=args.listen,
            sockets=sockets,
            tls=tls,
            allow_uids=args.allow_uid,
            limits=limits,
            start_serving=False,
        )
        undo.pop_all()
    return server


def export(args: argparse.Namespace, server: NbdServer, disk: Disk, options: SnapshotOptions | None) -> None:
    """Export the disk, and take the snapshot and export it: the bitmaps as they are, and as they were at T0.
    ConfigError, OSError."""
    bitmaps = [bitmap for name in args.bitmap for bitmap in find_bitmap(disk, name)]
    server.add_export(DISK, disk, writable=not args.read_only, bitmaps=bitmaps)
    if options is not None:
        (taken,) = take_snapshots([Wanted(disk, options, copies=bitmaps)])  # closed with the disk
        server.add_export(taken.snapshot.name, taken.snapshot, bitmaps=taken.copies, discard=bool(args.discard))


def find_bitmap(disk: Disk, name: str) -> list[DirtyBitmap]:
    """The bitmap of that name, made if it is not there, and persistent where it can be. ConfigError, OSError.

    None where it would say less than was written, or cannot be kept: the guest is served all the same, and whoever asks
    for the bitmap finds none."""
    try:
        if name not in disk.bitmaps:
            disk.bitmaps.add(name, persistent=not disk.read_only and disk.bitmaps.path is not None)
        disk.bitmaps[name]._check_consistent()
    except StateError as e:
        logger.warning("bitmap %r is not shown: %s", name, e)
        return []
    return [disk.bitmaps[name]]


def print_facts(args: argparse.Namespace, server: NbdServer, disk: Disk) -> None:
    """Say where clients find what."""
    uris = {name: server._uris_of(name) for name in server.exports}
    if args.json:
        exports = [ExportFacts(name, name != DISK or args.read_only, uris[name]) for name in server.exports]
        print_json(ServeFacts(args.disk, disk.size, args.target, os.getpid(), exports), indent=None)
    else:
        shown = {name: name if name.isprintable() else ascii(name) for name in uris}
        width = max(map(len, shown.values()))
        out = console()
        for name, found in uris.items():
            for uri in found:
                out.out(f"{shown[name]:{width}}  {uri}", highlight=False)
        out.out(f"ready: {size_text(disk.size)}, process {os.getpid()}", highlight=False)
    sys.stdout.flush()


def wait_for_end(server: NbdServer, ending: Ending, idle_exit: float | None) -> None:
    """Until a signal, or the end of the one client on stdio, or until there was no client for ``idle_exit`` seconds."""
    while True:
        left = None if idle_exit is None else idle_exit - server.idle_seconds
        if (left is not None and left <= 0) or ending.wait(left):
            return


class Ending:
    """When to end: at the first SIGTERM or SIGINT, or when `now` says so. The second signal kills the process."""

    def __enter__(self) -> Self:
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        # The byte comes whichever thread the kernel chose for the signal; a Python handler waits for the main thread.
        self._wakeup_before = signal.set_wakeup_fd(self._there.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._first) for number in ENDING}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._here.close()
        self._there.close()

    @staticmethod
    def _first(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)

    def now(self) -> None:
        """Let `wait` return True, as a signal does. From any thread."""
        with contextlib.suppress(BlockingIOError):
            self._there.send(b"\0")

    def wait(self, seconds: float | None) -> bool:
        """Whether it is the end, after up to ``seconds``."""
        return bool(select.select([self._here], [], [], seconds)[0])


class PidFile:
    """A file that holds the process's number while there is something to ask of it; ``path`` None: there is none."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._text = f"{os.getpid()}\n"

    def write(self) -> None:
        """Make it, or replace one that is there, all at once. OSError."""
        if self._path is None:
            return
        new = f"{self._path}.{os.getpid()}"
        try:
            with open(new, "w") as f:
                f.write(self._text)
            os.replace(new, self._path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise OSError(e.errno, e.strerror, self._path) from e

    def remove(self) -> None:
        """Unlink it, if it still is this process's."""
        if self._path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            with open(self._path) as f:
                ours = f.read() == self._text
            if ours:
                os.unlink(self._path)


# ---- stdio ----


class Stdio:
    """Serves the client that has the other ends of standard input and output, which nobody else uses from then on."""

    def __init__(self, server: NbdServer, limits: NbdLimits, ending: Ending) -> None:
        """Take the two descriptors: one socket, or two pipes."""
        self._server = server
        self._seconds = limits.stall_seconds
        self._ending = ending
        self._carriers: list[threading.Thread] = []
        self._sock = self._take()
        self._thread = threading.Thread(target=self._serve, name="nbd stdio", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.close()
        self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        try:
            with contextlib.suppress(ValueError):  # a signal came first, and the server is closed
                self._server.serve_connection(self._sock)
            for carrier in self._carriers:  # the last answers may still be on their way
                carrier.join(self._seconds)
        finally:
            self._ending.now()

    def _take(self) -> socket.socket:
        received, sent = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):
            os.dup2(nothing, fd)
        os.close(nothing)
        if stat.S_ISSOCK(mode_of(received)):
            os.close(sent)
            return socket.socket(fileno=received)
        ours, theirs = socket.socketpair()
        threading.Thread(target=carry_in, args=(received, theirs), name="nbd stdin", daemon=True).start()
        self._carriers.append(threading.Thread(target=carry_out, args=(theirs, sent), name="nbd stdout", daemon=True))
        self._carriers[0].start()
        return ours


def mode_of(fd: int) -> int:
    """The file mode of a descriptor; 0 where it is closed."""
    try:
        return os.fstat(fd).st_mode
    except OSError:
        return 0


def carry_in(fd: int, sock: socket.socket) -> None:
    """All that comes from a pipe, and then its end, to the server."""
    with contextlib.suppress(OSError):
        while piece := os.read(fd, PIECE):
            sock.sendall(piece)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def carry_out(sock: socket.socket, fd: int) -> None:
    """All that comes from the server, and then its end, to a pipe."""
    with contextlib.suppress(OSError), open(fd, "wb", buffering=0) as pipe:
        while piece := sock.recv(PIECE):
            write_all(pipe.write, piece)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def write_all(write: Callable[[bytes], int | None], piece: bytes) -> None:
    """A pipe's write may take a part. OSError."""
    while piece:
        piece = piece[write(piece) or 0 :]


# ---- the log ----


class OneLine(logging.Formatter):
    """A record is a line, whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return " ".join(super().format(record).splitlines())


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Warnings and errors of cbwcore go to stderr: snapshots that break, clients that are dropped."""
    logger = logging.getLogger("cbwcore")
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(OneLine("cbwcore: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
