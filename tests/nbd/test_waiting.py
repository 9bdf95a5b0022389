"""What waits: for a client's next request, for a copy. It costs no CPU for long, and holds up nobody else."""

import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, Guest, assert_t0, stalled

import cbwcore

SIZE = 40 * CLUSTER
PERIOD = 0.5
FLAT = 0.05  # seconds of CPU in it: far less than one thread that polls


@pytest.fixture
def disk(host):
    return host.disk(SIZE)


@pytest.fixture
def snap(host, disk):
    return host.snapshot(disk)


@pytest.fixture(params=[None, 0, 3])
def polling(request):
    """How many threads may poll; None: the default."""
    before = cbwcore.limits.polling_threads
    if request.param is not None:
        cbwcore.limits.polling_threads = request.param
    yield request.param
    cbwcore.limits.polling_threads = before


def cpu_of_this_process():
    """Seconds in a while that begins when everybody has had time to fall asleep."""
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(PERIOD)
    return time.process_time() - before


def test_idle_connections_cost_no_cpu(host, disk, snap, polling):
    """After reads, writes and copies, in ones and in crowds."""
    clients = [host.open() for _ in range(15)]
    for number, client in enumerate(clients):
        client.ok(nbd.WRITE, number * CLUSTER, 0, b"n" * 512)
        client.send(b"".join(client.expect(nbd.READ, i, 512) for i in range(20)))
        assert {client.reply().error for _ in range(20)} == {0}
    assert cpu_of_this_process() < FLAT


def test_a_client_that_stops_in_the_middle_of_a_request_costs_no_cpu(host, disk, polling):
    client = host.open()
    client.ok(nbd.WRITE, 0, 0, b"n" * 512)
    client.send((client.expect(nbd.WRITE, 0, 512) + b"m" * 512)[:100])
    assert cpu_of_this_process() < FLAT
    client.send((nbd.header(nbd.WRITE, 0, 512) + b"m" * 512)[100:])
    assert client.reply().error == 0
    assert client.read(0, 512) == b"m" * 512


def test_requests_are_served_whoever_may_poll(host, disk, snap, polling):
    client = host.open()
    for number in range(20):
        client.ok(nbd.WRITE, number * CLUSTER, 0, bytes([number]) * 512)
        assert client.read(number * CLUSTER, 512) == bytes([number]) * 512
    client.send(b"".join(client.expect(nbd.WRITE, n * CLUSTER + 512, 512) + bytes([n]) * 512 for n in range(40)))
    assert {client.reply().error for _ in range(40)} == {0}
    for number in range(40):
        assert client.read(number * CLUSTER + 512, 512) == bytes([number]) * 512
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("pause", [0, 0.3])
def test_a_copy_that_hangs_after_many_that_did_not_holds_up_its_own_write_alone(host, rig, disk, snap, pause):
    """Also where its client has been quiet for a while."""
    client = host.open()
    for number in range(20):
        client.ok(nbd.WRITE, number * CLUSTER, 0, b"n" * 512)
    time.sleep(pause)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    slow = client.request(nbd.WRITE, 20 * CLUSTER, 0, b"n" * 512)
    stalled(plan)
    assert client.read(20 * CLUSTER, 512) == disk.t0[20 * CLUSTER :][:512]
    client.ok(nbd.WRITE, 0, 0, b"m" * 512)
    later = client.request(nbd.WRITE, 21 * CLUSTER, 0, b"n" * 512)
    stalled(plan, 2)
    client.ok(nbd.FLUSH)
    plan.release()
    assert {client.reply(slow).error, client.reply(later).error} == {0}
    assert_t0(snap, disk.t0)


def test_answers_in_front_of_a_copy_that_hangs_are_sent(host, rig, disk, snap):
    """All in one piece, with copies before it too."""
    plan = rig.plan(snap)
    plan.stall("pwrite", start=5 * CLUSTER, end=6 * CLUSTER)
    client = host.open()
    sent = [client.expect(nbd.WRITE, n * CLUSTER, 512) + b"n" * 512 for n in range(20)]
    client.send(b"".join(sent))
    assert [client.reply().error for _ in range(19)] == [0] * 19
    assert len(client.pending) == 1
    plan.release()
    assert client.reply().error == 0
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("count", [1, 17, 40])
def test_copies_that_hang_cost_no_cpu(host, rig, disk, snap, count):
    """Also more of them than a connection may have run at once."""
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open()
    for number in range(count):
        client.request(nbd.WRITE, number * CLUSTER, 0, b"n" * 512)
    stalled(plan, min(count, 16))
    assert cpu_of_this_process() < FLAT
    plan.release()
    assert {client.reply().error for _ in range(count)} == {0}


@pytest.mark.parametrize("how", ["stop", "disconnect"])
def test_the_end_comes_while_a_copy_hangs(host, rig, disk, snap, how):
    """Its write is still answered."""
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open()
    slow = client.request(nbd.WRITE, 0, 0, b"n" * 512)
    stalled(plan)
    if how == "stop":
        closer = Guest(host.server.close)
    else:
        client.send(nbd.header(nbd.DISC))
        closer = None
    plan.release()
    assert client.reply(slow).error == 0
    host.ended()
    if closer is not None:
        closer.result()
    assert_t0(snap, disk.t0)
