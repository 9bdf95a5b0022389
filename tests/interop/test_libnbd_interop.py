"""libnbd's own interoperability programs, built as its interop/Makefile.am builds them for nbdkit and qemu-nbd, and
those of its tests that ask something of a server they start themselves.

Left out: interop/structured-read.c, which insists on qemu-nbd's chunks for holes, where the protocol lets the server
choose; PSK variants, since TLS is by certificates here; tests/errors-server-zerosize.c, which insists on nbdkit's
answer to a request of length 0, where the protocol leaves it open.
"""

import functools
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import interop_sources as sources
import numpy as np
import pytest
from interop_support import COMMAND, MIB, assert_same

SECONDS = 2  # that the parallel tests run, instead of 10


@pytest.fixture
def libnbd(needs, program):
    """The unpacked sources."""
    program("apt-get", "gcc", "dpkg")
    with needs():
        (found,) = sources.libnbd().glob("libnbd-*")
        sources.headers()
        return found


@pytest.fixture
def here(place, monkeypatch):
    """The programs run in the directory ``interop`` beside ``tests``, as in libnbd's tree."""
    (place / "interop").mkdir()
    monkeypatch.chdir(place / "interop")
    monkeypatch.setenv("LIBNBD_DEBUG", "1")
    return place / "interop"


@pytest.fixture
def server(here):
    """The path of a program that is `cbwcore serve`."""
    return script(here / "cbwcore-serve", f'exec {shlex.join(COMMAND)} "$@"')


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return path


@pytest.fixture
def build(libnbd, here, needs):
    """``build("interop/interop.c", NAME=value)``: the program's path. A str is a C string, a list several of them."""

    def build(source, **defines):
        output = here / Path(source).stem
        files = [libnbd / source]
        if "requires.h" in files[0].read_text():
            files.append(libnbd / "tests/requires.c")
        includes = [libnbd.parent, libnbd / "tests", libnbd / "common/include"]
        with needs():
            sources.compile_c(
                output, files, includes, [f"{name}={in_c(value)}" for name, value in defines.items()], ["nbd", "gnutls"]
            )
        return output

    return build


class Verbatim(str):
    """C, not a string of it."""


def in_c(value):
    if isinstance(value, list):
        return ", ".join(in_c(v) for v in value)
    return f'"{value}"' if isinstance(value, str) and not isinstance(value, Verbatim) else value


TMPFILE = Verbatim("TMPFILE")
FORGOTTEN = ["--idle-exit", "2"]  # a program that fails leaves the server that it has activated alone


def interop(server, *options, activated, **defines):
    """The definitions for interop.c and list-exports.c: how they start the server, of a file that they make."""
    params = [*(FORGOTTEN if activated else ["-s"]), *options, TMPFILE]
    more = {"SOCKET_ACTIVATION": 1} if activated else {}
    return {"SERVER": str(server), "SERVER_PARAMS": params, "NEEDS_TMPFILE": 1} | more | defines


ways = pytest.mark.parametrize("activated", [False, True], ids=["stdio", "socket activation"])


@ways
@pytest.mark.parametrize("name", ["", "disk", "snapshot"])
def test_interop(build, server, run, activated, name):
    run(build("interop/interop.c", **interop(server, activated=activated, EXPORT_NAME=name)))


@ways
def test_list_exports(build, server, run, activated):
    names = {"EXPORTS": ["disk", "snapshot"], "DESCRIPTIONS": ["", ""]}
    run(build("interop/list-exports.c", **interop(server, activated=activated, **names)))


def test_socket_activation(build, server, run):
    run(build("interop/socket-activation.c", SERVER=str(server), SERVER_PARAMS=[*FORGOTTEN, Verbatim("tmpfile")]))


# ---- TLS ----


@functools.cache
def made_pki(libnbd):
    """name → content of certificates made by libnbd's script; once, since keys take their time."""
    with tempfile.TemporaryDirectory() as directory:
        made = subprocess.run(
            ["bash", str(libnbd / "tests/make-pki.sh"), directory],
            env={"PATH": "/usr/bin:/bin", "SRCDIR": str(libnbd / "tests"), "CERTTOOL": "certtool"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert made.returncode == 0, made.stderr
        return {path.name: path.read_bytes() for path in Path(directory).glob("*.pem")}


@pytest.fixture
def pki(libnbd, here, program):
    """The directory with certificates, where the programs look for it."""
    program("certtool")
    directory = here.parent / "tests/pki"
    directory.mkdir(parents=True)
    for name, content in made_pki(libnbd).items():
        (directory / name).write_bytes(content)
    return directory


CERTS = {"CERTS": 1}
REQUIRE = {"TLS_MODE": Verbatim("LIBNBD_TLS_REQUIRE")}
ALLOW = {"TLS_MODE": Verbatim("LIBNBD_TLS_ALLOW")}


@ways
@pytest.mark.parametrize(
    ("client", "policy"), [(REQUIRE, "require"), (REQUIRE, "allow"), (ALLOW, "require"), (ALLOW, "allow")]
)
def test_tls(build, server, run, pki, activated, client, policy):
    options = "--tls-dir", str(pki), "--tls", policy
    run(build("interop/interop.c", **interop(server, *options, activated=activated, **CERTS, **client)))


@ways
def test_tls_falls_back(build, server, run, pki, activated):
    fallback = {"TLS_FALLBACK": 1}
    run(build("interop/interop.c", **interop(server, activated=activated, **CERTS, **ALLOW, **fallback)))


@ways
def test_a_client_without_tls_is_refused_where_it_is_required(build, server, run, pki, activated):
    program = build("interop/interop.c", **interop(server, "--tls-dir", str(pki), activated=activated))
    assert "server requires TLS encryption first" in run(program, status=1).stderr


# ---- contexts ----

WITH_BITMAP = """
import signal, socket, sys
import cbwcore
from cbwcore.nbd import NbdServer

KIB = 1024
with cbwcore.Disk(sys.argv[1]) as disk:
    disk.pwrite(b"x" * 64 * KIB, 0)
    bitmap = disk.bitmaps.add("bitmap0")
    disk.pwrite(b"y" * 64 * KIB, 64 * KIB)
    disk.pwrite_zeroes(512 * KIB, 64 * KIB)
    with NbdServer(sockets=[socket.socket(fileno=3)], start_serving=False) as server:
        server.add_export("disk", disk, bitmaps=[bitmap])
        server.start_serving()
        signal.pause()
"""


def test_dirty_bitmap(build, run, here):
    """Status of two contexts at once; libnbd's SIGTERM ends the server."""
    with open(here / "disk", "wb") as f:
        f.truncate(MIB)
    program = build("interop/dirty-bitmap.c")
    run(program, "qemu:dirty-bitmap:bitmap0", sys.executable, "-c", WITH_BITMAP, here / "disk")


# ---- tests that start a server themselves ----

# Called as libnbd's tests call nbdkit: the size may be among the arguments, and -r is read-only.
AS_NBDKIT = """
size=1M
for word; do
  case $word in
    -r) read_only=--read-only ;;
    size=*) size=${word#size=} ;;
    [0-9]*) size=$word ;;
  esac
done
truncate -s "$size" disk
exec %s -s --no-snapshot $read_only disk
"""


@pytest.fixture
def as_nbdkit(here, monkeypatch):
    """The program that these tests find by the name of nbdkit is `cbwcore serve`."""
    (here / "bin").mkdir()
    script(here / "bin/nbdkit", AS_NBDKIT % shlex.join(COMMAND))
    monkeypatch.setenv("PATH", str(here / "bin"), prepend=":")


@pytest.mark.parametrize(
    "name",
    [
        "errors-server-invalid-offset",
        "errors-server-unknown-flags",
        "get-size",
        "opt-abort",
        "opt-list-meta",
        "read-only-flag",
        "read-write-flag",
        "shutdown-flags",
    ],
)
def test_with_a_server_of_its_own(build, run, as_nbdkit, name):
    run(build(f"tests/{name}.c"))


# ---- parallel clients that know every byte ----


def counted(size):
    """What nbdkit's pattern plugin serves: each 8 bytes are their offset."""
    return np.arange(0, size, 8, dtype=">u8").tobytes()


@pytest.mark.parametrize(("name", "size"), [("aio-parallel", 64 * MIB), ("synch-parallel", 8 * MIB)])
def test_parallel(build, libnbd, run, serve, image, here, name, size):
    """Eight connections write and read; each read is compared with what must be there. The snapshot stays as it was."""
    source = here / f"{name}.c"
    source.write_text((libnbd / f"tests/{name}.c").read_text().replace("RUN_TIME 10", f"RUN_TIME {SECONDS}"))
    t0 = counted(size)
    path = image(t0)
    server = serve(path)
    run(build(source), server.socket)
    copy = here / "copy"
    run("nbdcopy", server.uri("snapshot"), copy)
    assert_same(copy, t0)
    with open(path, "rb") as f:
        assert f.read() != t0
