"""nbd's own test client: all modes of its tests/run/simple_test that ask something of a server.

Its modes end with status 0 even where the last replies were errors, so what the disk and the snapshot hold afterwards
is looked at, too.
"""

import shutil

import interop_sources as sources
import pytest
from interop_support import COMMAND, MIB, assert_same, pattern

import cbwcore

SMALL = 4 * MIB
HUGE = 50 * MIB  # what the transaction logs were recorded on; they expect zeroes
REQUEST_MAGIC = bytes.fromhex("25609513")
REQUEST_SIZE, REPLY_SIZE = 28, 16
DISCONNECT = 2


@pytest.fixture
def files(needs, program):
    """The directory with the client, its certificates and its transaction logs."""
    program("apt-get", "gcc", "dpkg")
    with needs():
        return sources.nbd_tester_client()


@pytest.fixture
def client(files, run, monkeypatch):
    """``client(*options, status=0)``: what the client printed."""
    monkeypatch.setenv("NBD_TEST_SILENT", "1")

    def client(*options, status=0):
        done = run(files / "nbd-tester-client", *options, status=status)
        return done.stdout + done.stderr

    return client


@pytest.fixture
def log(files, place):
    """``log(name)``: the options for a test of integrity by one of the transaction logs. Of the huge one, whose
    requests move 6 GB, the first 40 requests."""

    def log(name):
        path = files / f"{name}-test.tr"
        if name == "integrityhuge":
            path = place / "shortened.tr"
            path.write_bytes(shortened((files / f"{name}-test.tr").read_bytes(), 40))
        return "-i", "-t", path

    return log


def shortened(log, requests):
    """A transaction log's first requests, and the disconnection that must end it."""
    kept, at = b"", 0
    for _ in range(requests):
        while log[at : at + 4] != REQUEST_MAGIC:
            at += REPLY_SIZE  # its replies are not looked at
        kept += log[at : at + REQUEST_SIZE]
        at += REQUEST_SIZE
    return kept + REQUEST_MAGIC + DISCONNECT.to_bytes(4, "big") + bytes(20)


@pytest.fixture
def certificates(files, place):
    """nbd's certificates, and the client's options that show one and check the server's."""
    shutil.copytree(files / "certs", place / "certs")
    (place / "certs/server-key.pem").chmod(0o600)
    return place / "certs"


def shows(certificates, name="client"):
    """Options with which the client shows a certificate; it verifies that the server is ``localhost``."""
    mine = "-C", certificates / f"{name}-cert.pem", "-K", certificates / f"{name}-key.pem"
    return *mine, "-A", certificates / "ca-cert.pem", "-H", "localhost"


@pytest.fixture
def pull(place, run):
    """``pull(uri)``: the bytes of an export, as nbdcopy reads them."""

    def pull(uri):
        copy = place / "pulled"
        run("nbdcopy", uri, copy)
        try:
            return copy.read_bytes()
        finally:
            copy.unlink()

    return pull


@pytest.fixture
def in_process(place):
    """``in_process(image, **server_options)``: an `NbdServer` of this process with the exports disk and snapshot."""
    from cbwcore.nbd import NbdServer

    opened = []

    def in_process(image, **options):
        disk = cbwcore.Disk(image)
        opened.append(disk)
        server = NbdServer(**({"socket": place / "nbd"} | options))
        opened.append(server)
        server.add_export("disk", disk, writable=True)
        server.add_export("snapshot", disk.snapshot(place / "target"))
        return server

    yield in_process
    for one in reversed(opened):
        one.close()


def limits():
    """Limits under which the huge transaction log's requests of 47.6 MiB are served."""
    from cbwcore.nbd import NbdLimits

    return NbdLimits(request=64 * MIB)


# ---- the handshake and single requests ----


def test_handshake(client, serve, image):
    server = serve(image(pattern(SMALL)))
    assert "Handshake test completed" in client("-h", "-N", "disk", "-u", server.socket)


def test_a_name_that_is_not_exported(client, serve, image):
    server = serve(image(pattern(SMALL)))
    assert "Test failed, as expected" in client("-F", "-N", "nothing", "-u", server.socket)
    server.stop(stderr=None)
    assert "there is no export 'nothing'" in server.stderr


def test_oversized(client, serve, image):
    server = serve(image(pattern(SMALL)))
    printed = client("-o", "-N", "disk", "-u", server.socket)
    assert printed.count(": OK") == 3, printed


# ---- throughput ----


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_reads(client, serve, image, name):
    server = serve(image(pattern(SMALL)))
    assert "Throughput read test (without flushes) complete" in client("-N", name, "-u", server.socket)


@pytest.mark.parametrize("flush", [False, True], ids=["plain", "flush and FUA"])
def test_writes(client, serve, image, pull, flush):
    t0 = pattern(SMALL)
    path = image(t0)
    server = serve(path)
    printed = client("-w", *(["-f"] if flush else []), "-N", "disk", "-u", server.socket)
    assert f"Throughput write test ({'with' if flush else 'without'} flushes) complete" in printed
    assert_same(path, b"X" * SMALL)
    assert_same(pull(server.uri("snapshot")), t0)


def test_writes_to_a_snapshot_are_refused(client, serve, image, pull):
    t0 = pattern(SMALL)
    server = serve(image(t0))
    client("-w", "-F", "-N", "snapshot", "-u", server.socket)
    assert_same(pull(server.uri("snapshot")), t0)
    assert_same(pull(server.uri("disk")), t0)


# ---- integrity ----


def test_integrity(client, serve, image, pull, log):
    path = image(bytes(HUGE))
    server = serve(path)
    printed = client(*log("integrity"), "-N", "disk", "-u", server.socket)
    assert "Integrity read test complete" in printed
    assert "may error" not in printed  # FLUSH and FUA are offered
    assert pull(server.uri("disk")).count(0) < HUGE
    assert_same(pull(server.uri("snapshot")), bytes(HUGE))


def test_integrity_of_huge_requests(client, in_process, image, pull, log):
    path = image(bytes(HUGE))
    server = in_process(path, limits=limits())
    printed = client(*log("integrityhuge"), "-N", "disk", "-u", path_of(server))
    assert "Integrity read test complete" in printed
    assert_same(pull(server.uri("snapshot")), bytes(HUGE))


def test_requests_above_the_limit_are_refused(client, serve, image, log):
    server = serve(image(bytes(HUGE)))
    assert "Server errored a transaction" in client(*log("integrityhuge"), "-N", "disk", "-u", server.socket, status=1)


# ---- other ways in ----


def path_of(server):
    """The path of the unix socket that a server of this process listens on."""
    return server.uri("disk").rpartition("socket=")[2]


def test_tcp(client, in_process, image, log, pull):
    server = in_process(image(bytes(HUGE)), socket=None, listen="127.0.0.1:0")
    port = server.uri("disk").rpartition(":")[2].partition("/")[0]
    assert "Integrity read test complete" in client(*log("integrity"), "-N", "disk", "localhost", port)
    assert_same(pull(server.uri("snapshot")), bytes(HUGE))


def test_inetd(client, image):
    path = image(pattern(SMALL))
    command = *COMMAND, "-s", path
    assert "Throughput write test" in client("-w", "-N", "disk", "-I", "--", *command)
    assert_same(path, b"X" * SMALL)


# ---- TLS ----


@pytest.fixture
def tls(in_process, certificates):
    """``tls(image)``: a server that requires TLS, with limits for the huge log."""
    from cbwcore.nbd import TlsConfig

    return lambda image: in_process(image, tls=TlsConfig(certificates), limits=limits())


@pytest.mark.parametrize("name", ["integrity", "integrityhuge"])
def test_tls(client, tls, certificates, image, log, name):
    path = image(bytes(HUGE))
    server = tls(path)
    options = shows(certificates)
    assert "Integrity read test complete" in client(*log(name), *options, "-N", "disk", "-u", path_of(server))
    with open(path, "rb") as f:
        assert any(f.read())


def test_tls_with_a_certificate_of_nobody(client, tls, certificates, image):
    server = tls(image(pattern(SMALL)))
    printed = client("-F", *shows(certificates, "selfsigned"), "-N", "disk", "-u", path_of(server))
    assert "Test failed, as expected" in printed


def test_tls_is_required(client, tls, image):
    server = tls(image(pattern(SMALL)))
    assert "Test failed, as expected" in client("-F", "-N", "disk", "-u", path_of(server))
