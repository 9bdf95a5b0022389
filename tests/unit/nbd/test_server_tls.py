"""The server with TLS."""

import gc
import subprocess

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, stalled, until
from nbd_support import Client, nbd_threads
from programs_support import need

from cbwcore.nbd import TlsConfig

WRITTEN = b"by NBD" * 100
ANYWHERE = "0.0.0.0:0"


def test_tls_end_to_end(host, certificates, client_context):
    server = host.serve(tls=TlsConfig(certificates))
    assert server.uri("disk").startswith("nbds+unix:///disk?")
    with Client(server.path) as plain:
        assert plain.hello().go("disk").error == nbd.ERR_TLS_REQD
    client = host.open_tls(server, client_context)
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
    plain, secret = host.open(server), host.open_tls(server, client_context)
    secret.ok(nbd.WRITE, 0, 0, WRITTEN)
    assert plain.read(0, 6) == WRITTEN[:6]
    assert server.connections == 2


@pytest.mark.parametrize("end", ["close", "remove_export"])
def test_tls_requests_in_flight_are_answered_at_the_end(host, certificates, client_context, end):
    server = host.serve(tls=TlsConfig(certificates))
    idle, client = host.open_tls(server, client_context), host.open_tls(server, client_context)
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
    host.open_tls(server, client_context).sock.close()
    until(lambda: server.connections == 0 and len(nbd_threads()) == 1, "it is gone")
    with unchanged(server.disk):
        for _ in range(3):
            with Client(server.path) as client:
                client.hello().starttls(client_context, "localhost").go("disk")
                client.request(nbd.READ, 0, CLUSTER)
            until(lambda: server.connections == 0 and len(nbd_threads()) == 1, "it is gone")
        gc.collect()
