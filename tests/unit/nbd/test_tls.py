"""TLS of the handshake: certificates, STARTTLS, what it forgets, who is let in."""

import contextlib
import gc
import os
import random
import socket
import ssl

import pytest
from handshake_support import (
    ABORT,
    ACK,
    BASE,
    EXPORT_NAME,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    POLICY,
    REP_INFO,
    SET_META,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    go,
    meta,
    option,
)
from tls_support import openssl

import cbwcore
from cbwcore.nbd import NbdLimits, TlsConfig
from cbwcore.nbd.handshake import HandshakeError

# ---- certificates ----


def test_certificates_are_found_by_their_names(directory):
    assert TlsConfig(directory).required
    assert not TlsConfig(str(directory), required=False).required


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_missing_certificate_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name)):
        TlsConfig(directory)
    (directory / name).mkdir()
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name)):
        TlsConfig(directory)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"])
@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(range(256))])
def test_a_bad_certificate_is_named(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name.replace("key", "cert"))) as e:
        TlsConfig(directory)
    assert "\n" not in str(e.value)


def test_the_key_of_another_certificate_is_refused(directory, authorities):
    (directory / "server-key.pem").write_bytes((authorities / "client-key.pem").read_bytes())
    with pytest.raises(cbwcore.ConfigError, match="KEY_VALUES_MISMATCH"):
        TlsConfig(directory)


def test_an_encrypted_key_is_refused_and_nobody_is_asked(directory, authorities):
    openssl(
        authorities,
        "ec",
        "-in",
        "server-key.pem",
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        str(directory / "server-key.pem"),
    )
    with pytest.raises(cbwcore.ConfigError, match=r"server-key\.pem is encrypted"):
        TlsConfig(directory)


def test_revocations_that_cannot_be_read_are_not_taken_for_none(directory):
    (directory / "ca-crl.pem").symlink_to(directory / "nowhere")
    with pytest.raises((cbwcore.ConfigError, OSError), match=r"ca-crl\.pem"):
        TlsConfig(directory)


@pytest.mark.parametrize("names", [["crl", "other"], ["other"], ["ca"]])
def test_a_certificate_among_the_revoked_is_not_trusted(directory, authorities, names):
    (directory / "ca-crl.pem").write_bytes(b"".join((authorities / f"{name}.pem").read_bytes() for name in names))
    with pytest.raises(cbwcore.ConfigError, match=r"ca-crl\.pem"):
        TlsConfig(directory)


# ---- the handshake ----


def test_a_session_from_its_beginning(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    assert client.sock.version() == "TLSv1.3"
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    requests = random.Random(1).randbytes(1000)
    client.send(option(GO, go("disk")) + requests)  # in one TLS record
    assert [client.reply(GO)[0] for _ in range(3)] == [REP_INFO, REP_INFO, ACK]
    negotiated = client.guest.result()
    assert negotiated[1:] == (exports.find("disk"), True, (None,))
    assert isinstance(negotiated.sock, ssl.SSLSocket)
    assert client.served.fileno() not in (-1, negotiated.sock.fileno()), "the caller's socket is the caller's"
    assert negotiated.sock.recv(2000) == requests


@pytest.mark.parametrize("number", [0, LIST, 4, INFO, GO, STRUCTURED, LIST_META, SET_META, 11, 99])
@pytest.mark.parametrize("payload", [b"", go("disk"), bytes(70000)])
def test_without_tls_all_is_refused_where_it_is_required(connect, exports, directory, as_client, number, payload):
    client = connect(exports, tls=TlsConfig(directory))
    assert [kind for kind, _ in client.ask(number, payload)] == [TLS_REQD]
    client.starttls(as_client())
    assert not client.go("disk").structured


def test_without_tls_an_export_name_drops_where_it_is_required(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory))
    client.send(option(EXPORT_NAME, b"disk"))
    client.dropped("TLS")


def test_without_tls_a_client_may_abort(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory))
    assert client.ends(ABORT) == ACK
    client.left()


def test_tls_that_is_not_required(connect, exports, directory, as_client):
    tls = TlsConfig(directory, required=False)
    assert connect(exports, tls=tls).go("disk").export.name == "disk"
    client = connect(exports, tls=tls)
    client.starttls(as_client())
    assert isinstance(client.go("disk").sock, ssl.SSLSocket)


def test_a_server_without_tls_says_so(connect, exports):
    client = connect(exports)
    assert client.ends(STARTTLS) == POLICY
    client.go("disk")


def test_starttls_takes_no_payload_and_comes_once(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    assert client.ends(STARTTLS, b"x") == INVALID
    client.starttls(as_client())
    assert client.ends(STARTTLS) == INVALID
    client.go("disk")


def test_starttls_forgets_what_was_negotiated(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory, required=False))
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    client.starttls(as_client())
    assert client.ends(SET_META, meta("disk", BASE)) == INVALID, "structured replies are forgotten"
    assert client.go("disk")[2:] == (False, ())


def test_starttls_forgets_contexts_too(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory, required=False))
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    client.starttls(as_client())
    assert client.ends(STRUCTURED) == ACK
    assert client.go("disk")[2:] == (True, ())


def test_options_count_on_through_starttls(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory), limits=NbdLimits(options=2))
    client.starttls(as_client())
    assert client.ends(LIST) == ACK
    client.send(option(GO, go("disk")))
    with pytest.raises(HandshakeError, match="more than 2 options"):
        client.guest.result()


@pytest.mark.parametrize("injected", [option(GO, go("disk")), option(STRUCTURED) * 40, option(LIST) + b"\x16\3\1"])
def test_plaintext_behind_starttls_is_no_part_of_the_session(connect, exports, directory, as_client, injected):
    """What somebody on the wire adds in the clear must not be taken for the authenticated client's."""
    client = connect(exports, tls=TlsConfig(directory))
    client.send(option(STARTTLS) + injected)
    assert client.reply(STARTTLS) == (ACK, b"")
    with pytest.raises(HandshakeError, match="TLS failed"):
        client.guest.result()
    client.served.shutdown(socket.SHUT_RDWR)
    assert client.sock.recv(4096)[:1] in (b"", b"\x15"), "at most a TLS alert"


@pytest.mark.parametrize(
    ("name", "crl", "match"),
    [
        (None, None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("stranger", None, "issuer|self.signed"),
        ("revoked", "crl", "revoked"),
        ("stranger", "crl", "issuer|self.signed"),
    ],
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_good_certificate_is_dropped(
    connect, exports, directory, authorities, as_client, name, crl, match, version
):
    if crl:
        (directory / "ca-crl.pem").write_bytes((authorities / f"{crl}.pem").read_bytes())
    client = connect(exports, tls=TlsConfig(directory))
    context = as_client(name)
    context.minimum_version = context.maximum_version = version
    with contextlib.suppress(OSError, AssertionError):  # in TLS 1.3 it hears of it only after its own handshake
        client.starttls(context)
        client.read(1)
        pytest.fail("the server went on")
    with pytest.raises(HandshakeError, match=match):
        client.guest.result()


@pytest.mark.parametrize(("name", "crl"), [("revoked", "empty-crl"), ("client", "crl")])
def test_a_client_that_is_not_revoked_is_served(connect, exports, directory, authorities, as_client, name, crl):
    (directory / "ca-crl.pem").write_bytes((authorities / f"{crl}.pem").read_bytes())
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client(name))
    client.go("disk")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    context = as_client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        client.starttls(context)
    with pytest.raises(HandshakeError, match="UNSUPPORTED_PROTOCOL"):
        client.guest.result()


def test_a_client_that_stops_in_the_tls_handshake_is_dropped_in_time(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory), seconds=0.4)
    assert client.ask(STARTTLS) == [(ACK, b"")]
    client.send(b"\x16\3\1")
    with pytest.raises(TimeoutError):
        client.guest.result()


def test_another_thread_may_end_a_tls_session(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    assert client.ends(LIST)
    client.served.shutdown(socket.SHUT_RDWR)
    client.left()


def test_a_session_that_is_not_served_is_closed_and_says_so(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    client.send(option(EXPORT_NAME, b"nobody"))
    with pytest.raises(HandshakeError, match="nobody"):
        client.guest.result()
    before = len(os.listdir("/proc/self/fd"))
    assert client.sock.recv(1) == b""
    client.close()
    gc.collect()
    assert before - len(os.listdir("/proc/self/fd")) == 2, "only the test's own two were left"
