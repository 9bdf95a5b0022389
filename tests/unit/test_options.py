"""Snapshot options: their checks, their QAPI form, and that a snapshot is what they say."""

import math

import pytest

import cbwcore
from cbwcore import OnCbwError, SnapshotOptions

CLUSTER = 65536
LEAST = {"file": "disk0", "target": "fleece.img"}


def test_the_least_qapi_options_have_qemus_defaults():
    options = SnapshotOptions.from_qapi(LEAST)
    assert (options.file, options.target) == ("disk0", "fleece.img")
    assert options.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE
    assert (options.cbw_timeout, options.cluster_size, options.bitmap, options.name) == (0, CLUSTER, None, None)


def test_all_qapi_options_by_their_dashed_names():
    given = {
        **LEAST,
        "driver": "copy-before-write",
        "node-name": "cbw0",
        "bitmap": {"node": "disk0", "name": "since-monday"},
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": 45,
        "min-cluster-size": 1 << 20,
    }
    before = dict(given)
    options = SnapshotOptions.from_qapi(given)
    assert given == before
    assert options.name == "cbw0"
    assert (options.bitmap.node, options.bitmap.name) == ("disk0", "since-monday")
    assert options.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
    assert (options.cbw_timeout, options.cluster_size) == (45, 1 << 20)


@pytest.mark.parametrize(
    ("least", "cluster_size"),
    [(1, CLUSTER), (4096, CLUSTER), (CLUSTER, CLUSTER), (2 * CLUSTER, 2 * CLUSTER), (64 << 20, 64 << 20)],
)
def test_min_cluster_size_is_at_least_64_kib_as_in_qemu(least, cluster_size):
    assert SnapshotOptions.from_qapi({**LEAST, "min-cluster-size": least}).cluster_size == cluster_size


WRONG_KEYS = ["cluster-size", "on_cbw_error", "cbw_timeout", "min_cluster_size", "node_name", "discard", "Target", ""]


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_an_unknown_qapi_key_is_refused_by_name(key):
    with pytest.raises(cbwcore.ConfigError, match=f"unknown.*`{key}`"):
        SnapshotOptions.from_qapi({**LEAST, key: "x"})


def test_an_unknown_key_of_the_bitmap_is_refused_by_name():
    with pytest.raises(cbwcore.ConfigError, match=r"unknown.*`persistent`.*bitmap"):
        SnapshotOptions.from_qapi({**LEAST, "bitmap": {"node": "n", "name": "b", "persistent": True}})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"file": None}, "file"),
        ({"target": None}, "target"),
        ({"target": 5}, "target"),
        ({"target": {"driver": "file", "filename": "x"}}, "target"),
        ({"driver": "raw"}, "raw"),
        ({"on-cbw-error": "ignore"}, "ignore"),
        ({"on-cbw-error": None}, "on-cbw-error"),
        ({"cbw-timeout": -1}, "-1"),
        ({"cbw-timeout": "45"}, "cbw-timeout"),
        ({"cbw-timeout": math.nan}, "nan"),
        ({"min-cluster-size": 100_000}, "100000"),
        ({"min-cluster-size": 128 << 20}, str(128 << 20)),
        ({"min-cluster-size": 65536.5}, "min-cluster-size"),
        ({"min-cluster-size": True}, "min-cluster-size"),
        ({"min-cluster-size": -5}, "-5"),
        ({"bitmap": "b"}, "bitmap"),
        ({"bitmap": {"name": "b"}}, "node"),
        ({"bitmap": {"node": "n"}}, "name"),
        ({"node-name": ""}, "name"),
        ({"node-name": "n" * 1024}, "1023"),
        ({5: "x"}, "str"),
    ],
    ids=str,
)
def test_bad_qapi_values_are_refused(changes, why):
    with pytest.raises(cbwcore.ConfigError, match=why):
        SnapshotOptions.from_qapi({**LEAST, **changes})


@pytest.mark.parametrize("missing", ["file", "target"])
def test_file_and_target_are_required(missing):
    with pytest.raises(cbwcore.ConfigError, match=missing):
        SnapshotOptions.from_qapi({key: value for key, value in LEAST.items() if key != missing})


@pytest.mark.parametrize("options", [None, "file", 5, [1]], ids=repr)
def test_qapi_options_are_a_mapping(options):
    with pytest.raises((TypeError, cbwcore.ConfigError)):
        SnapshotOptions.from_qapi(options)


def test_taking_a_snapshot_with_qapi_options(make_disk, place):
    disk = make_disk(3 * CLUSTER)
    disk.bitmaps.add("b").set_range(CLUSTER, 1)
    options = SnapshotOptions.from_qapi(
        {
            "file": "disk0",
            "target": str(place / "target"),
            "node-name": "cbw0",
            "bitmap": {"node": "disk0", "name": "b"},
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": 4.5,
        }
    )
    t0 = disk.pread(CLUSTER, CLUSTER)
    with options.take(disk) as snapshot:
        assert (snapshot.name, snapshot.cluster_size, snapshot.cbw_timeout) == ("cbw0", CLUSTER, 4.5)
        assert snapshot.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
        disk.pwrite(b"new", CLUSTER)
        assert snapshot.pread(CLUSTER, CLUSTER) == t0
        with pytest.raises(cbwcore.SnapshotAccessError):
            snapshot.pread(1, 0)


def test_a_bitmap_that_the_disk_has_not_is_refused_by_name(make_disk, place, unchanged):
    disk = make_disk(CLUSTER)
    options = SnapshotOptions.from_qapi({**LEAST, "target": str(place / "t"), "bitmap": {"node": "n", "name": "gone"}})
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="gone"):
        options.take(disk)


@pytest.mark.parametrize("cluster_size", [1 << shift for shift in range(12, 27)])
def test_a_cluster_size_is_exact(make_disk, cluster_size):
    disk = make_disk(5000)
    with disk.snapshot(cluster_size=cluster_size) as snapshot:
        assert snapshot.cluster_size == cluster_size
        t0 = disk.pread(5000, 0)
        disk.pwrite(b"x", 4999)
        assert snapshot.pread(5000, 0) == t0
        assert snapshot.stats().cbw_bytes == (904 if cluster_size == 4096 else 5000)


TIMEOUTS = [0, 0.0, 1e-12, 0.05, 4.295, 45, 2**31, 2**64, 1e300, math.inf, 10**400]


@pytest.mark.parametrize("timeout", TIMEOUTS, ids=lambda t: f"{t!r:.10}")
def test_a_timeout_of_any_size_holds(make_disk, timeout):
    """None wraps, none overflows, and an untroubled write meets none but the shortest."""
    disk = make_disk(CLUSTER)
    t0 = disk.pread(CLUSTER, 0)
    with disk.snapshot(cbw_timeout=timeout) as snapshot:
        assert snapshot.cbw_timeout == timeout
        if timeout == 0 or timeout > 1:
            disk.pwrite(b"x", 0)
        snapshot.cbw_timeout = timeout
        assert snapshot.pread(CLUSTER, 0) == t0


@pytest.mark.parametrize("name", ["a", "x" * 1023, "é" * 511, "with space/and slash", "快照", None])
def test_names(make_disk, name):
    disk = make_disk(CLUSTER)
    with disk.snapshot(name=name) as snapshot:
        assert snapshot.name == (name or "snapshot")


@pytest.mark.parametrize("policy", [*OnCbwError, "break-guest-write", "break-snapshot"])
def test_policies_by_member_or_by_text(make_disk, policy):
    with make_disk(CLUSTER).snapshot(on_cbw_error=policy) as snapshot:
        assert snapshot.on_cbw_error is OnCbwError(policy)
