"""`cbwcore bitmap`: what it prints, its exit codes, and what it leaves."""

import json
import os

import pytest
from bitmap_support import UNIT, granules, killed, sidecar

import cbwcore
from cbwcore import bitmap_file
from cbwcore.cli import main

SIZE = 100 * UNIT + 1000


@pytest.fixture
def ok(run):
    """What ``cbwcore bitmap`` prints; it must succeed, without a word on stderr."""

    def call(action, *argv):
        status, out, err = run("bitmap", action, *argv)
        assert (status, err) == (0, "")
        return out

    return call


@pytest.fixture
def refused(run):
    """The one line on stderr of a ``cbwcore bitmap`` that must fail, with this exit code."""

    def call(status, action, *argv):
        found, out, err = run("bitmap", action, *argv)
        assert (found, out) == (status, "")
        assert err.startswith("cbwcore")
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture
def disk(place):
    path = place / "disk"
    with open(path, "wb") as f:
        f.truncate(SIZE)
    return path


def write(disk, *units):
    with cbwcore.Disk(disk) as d:
        for unit in units:
            d.pwrite(b"x", unit * UNIT)


def listed(ok, disk, *options):
    return {b["name"]: b for b in json.loads(ok("list", disk, "--json", *options))["bitmaps"]}


def test_a_day(ok, disk):
    ok("add", disk, "daily")
    ok("add", disk, "fine", "--granularity", "4K", "--disabled")
    write(disk, 3, 7)
    assert listed(ok, disk) == {
        "daily": {
            "name": "daily",
            "granularity": UNIT,
            "enabled": True,
            "dirty": 2 * UNIT,
            "since": None,
            "inconsistent": None,
        },
        "fine": {
            "name": "fine",
            "granularity": 4096,
            "enabled": False,
            "dirty": 0,
            "since": None,
            "inconsistent": None,
        },
    }
    ok("merge", disk, "fine", "daily")
    ok("clear", disk, "daily")
    write(disk, 9)
    found = listed(ok, disk)
    assert (found["daily"]["dirty"], found["fine"]["dirty"]) == (UNIT, 2 * UNIT)
    ok("remove", disk, "daily", "fine")
    assert listed(ok, disk) == {}


def test_list_for_people(ok, disk, place):
    assert ok("list", disk) == f"no bitmaps in {sidecar(disk)}\n"
    assert os.listdir(place) == ["disk"]
    ok("add", disk, "daily")
    ok("add", disk, "odd\n", "--disabled")
    write(disk, 3)
    with cbwcore.Disk(disk) as d:
        d.bitmaps["daily"].since = "monday"
    head, daily, odd = ok("list", disk).splitlines()
    assert head.split() == ["name", "granularity", "state", "dirty", "since"]
    assert daily.split() == ["daily", "64", "KiB", "recording", "64", "KiB", "monday"]
    assert odd.split() == [r"'odd\n'", "64", "KiB", "disabled", "0", "bytes", "-"]


def test_list_as_json(ok, disk):
    facts = json.loads(ok("list", disk, "--json"))
    assert facts == {"disk": str(disk), "size": SIZE, "file": sidecar(disk), "bitmaps": []}


def test_list_changes_nothing_and_needs_no_writer_to_be_gone_but_one(ok, refused, disk):
    ok("add", disk, "daily")
    with open(sidecar(disk), "rb") as f:
        before = f.read()
    with cbwcore.Disk(disk, read_only=True):
        ok("list", disk)
    with open(sidecar(disk), "rb") as f:
        assert f.read() == before
    with cbwcore.Disk(disk):
        assert "is in use" in refused(1, "list", disk)


def test_after_a_kill(ok, disk):
    ok("add", disk, "daily")

    def life():
        d = cbwcore.Disk(disk)
        d.pwrite(b"x", 5 * UNIT)

    killed(life)
    assert listed(ok, disk)["daily"]["dirty"] == UNIT


def test_inconsistent_ones_are_shown_and_removed(ok, refused, disk, monkeypatch):
    ok("add", disk, "daily")
    killed(lambda: cbwcore.Disk(disk))
    monkeypatch.setattr(bitmap_file, "boot_id", lambda: "another")
    found = listed(ok, disk)["daily"]
    assert (found["inconsistent"], found["dirty"]) == ("the machine went down while the disk was in use", None)
    assert "inconsistent:" in ok("list", disk)
    for action in (["clear", disk, "daily"], ["export", disk, "daily", disk.parent / "out"]):
        assert "is inconsistent, remove it: the machine went down" in refused(1, *action)
    assert not (disk.parent / "out").exists()
    ok("remove", disk, "daily")
    assert listed(ok, disk) == {}


def test_a_damaged_file(ok, refused, disk):
    ok("add", disk, "daily")
    with open(sidecar(disk), "r+b") as f:
        f.write(bytes(1 << 20))
    for action in (["list", disk], ["add", disk, "x"], ["remove", disk, "daily"], ["export", disk, "daily", "out"]):
        assert "damaged" in refused(1, *action)
    ok("reset", disk)
    ok("add", disk, "daily")
    assert list(listed(ok, disk)) == ["daily"]


def test_what_is_not_there(refused, ok, disk):
    ok("add", disk, "daily")
    write(disk, 3)
    for action in (
        ["remove", "daily", "no"],
        ["clear", "daily", "no"],
        ["merge", "daily", "no"],
        ["merge", "no", "daily"],
    ):
        assert "has no bitmap 'no'" in refused(1, action[0], disk, *action[1:])
    assert listed(ok, disk)["daily"]["dirty"] == UNIT
    ok("remove", disk, "daily", "daily")
    assert "No such file" in refused(1, "list", disk.parent / "none")
    assert not os.path.exists(sidecar(disk.parent / "none"))


def test_names_and_granularities(refused, ok, disk, place):
    for arguments in (
        ["x", "--granularity", "1000"],
        ["x", "--granularity", "4T"],
        ["x", "--granularity", "odd"],
        [""],
    ):
        refused(2, "add", disk, *arguments)
    for arguments in ([], ["add"], ["add", disk], ["remove", disk], ["frobnicate", disk]):
        refused(2, *(arguments or [""]))
    assert os.listdir(place) == ["disk"]
    ok("add", disk, "x")
    assert "has a bitmap 'x' already" in refused(1, "add", disk, "x")


def test_a_file_elsewhere(ok, disk, place):
    own = place / "own"
    ok("add", disk, "x", "--bitmaps", own)
    assert list(listed(ok, disk, "--bitmaps", own)) == ["x"]
    assert listed(ok, disk) == {}
    assert sorted(os.listdir(place)) == ["disk", "own"]


def test_a_block_device(ok, refused, resources, disk):
    try:
        device = resources.loop(str(disk))
    except RuntimeError as e:
        pytest.skip(str(e))
    for action in ("list", "add"):
        assert "--bitmaps says where" in refused(2, action, device, *(["x"] if action == "add" else []))
    ok("add", device, "x", "--bitmaps", disk.parent / "own")
    assert list(listed(ok, device, "--bitmaps", disk.parent / "own")) == ["x"]


# ---- export and import ----


@pytest.fixture
def exported(ok, disk, place):
    """A file with units 3 and 7 and the short last one, of a bitmap that has recorded on."""
    ok("add", disk, "daily")
    write(disk, 3, 7, 100)
    ok("export", disk, "daily", place / "file")
    write(disk, 50)
    return place / "file"


def test_export_says_what_it_is(exported):
    content = json.loads(exported.read_text())
    crc = content.pop("crc32c")
    assert content == {
        "format": "cbwcore-bitmap",
        "version": 1,
        "name": "daily",
        "size": SIZE,
        "granularity": UNIT,
        "ranges": [[3 * UNIT, UNIT], [7 * UNIT, UNIT], [100 * UNIT, 1000]],
    }
    plain = json.dumps({**content, "crc32c": 0}, separators=(",", ":")).encode()
    assert crc == bitmap_file.checksum(memoryview(plain))


def test_import_makes_a_bitmap(ok, refused, disk, exported):
    assert "has a bitmap 'daily' already: import under another --name" in refused(1, "import", disk, exported)
    ok("import", disk, exported, "--name", "copy")
    ok("import", disk, exported, "--name", "rest", "--disabled")
    write(disk, 60)
    with cbwcore.Disk(disk) as d:
        assert granules(d.bitmaps["copy"]) == {3, 7, 100, 60}
        assert granules(d.bitmaps["rest"]) == {3, 7, 100}
        assert d.bitmaps["copy"].since is None
    ok("remove", disk, "daily")
    ok("import", disk, exported)
    assert listed(ok, disk)["daily"]["dirty"] == 2 * UNIT + 1000


def test_whoever_finds_an_imported_bitmap_finds_its_bits(disk, exported):
    """Killed at any step."""
    seen = set()
    for last in range(40):
        left = [last]

        def step(what, left=left):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)

        def life(step=step):
            bitmap_file.step = step
            main(["bitmap", "import", str(disk), str(exported), "--name", "copy"])

        killed(life)
        with cbwcore.Disk(disk) as d:
            seen.add("copy" in d.bitmaps)
            if "copy" in d.bitmaps:
                assert granules(d.bitmaps["copy"]) == {3, 7, 100}
                d.bitmaps.remove("copy")
    assert seen == {True, False}


def test_import_of_another_size(ok, refused, disk, exported, place):
    other = place / "other"
    other.write_bytes(bytes(SIZE + 1))
    assert f"is of a disk of {SIZE} bytes, and this one has {SIZE + 1}" in refused(1, "import", other, exported)
    assert not os.path.exists(sidecar(other))


def test_import_of_a_damaged_file(refused, ok, disk, exported):
    data = exported.read_bytes()
    for at in range(0, len(data), 3):
        if data[at : at + 1].isspace():
            continue
        exported.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused(1, "import", disk, exported, "--name", "copy")
    for at in (0, 1, 50, len(data) - 3):
        exported.write_bytes(data[:at])
        refused(1, "import", disk, exported, "--name", "copy")
    exported.write_bytes(b"\xff" * 100)
    assert "no bitmap that cbwcore has exported, or damaged" in refused(1, "import", disk, exported, "--name", "copy")
    exported.write_text(json.dumps({**json.loads(data), "version": 2}))
    assert "version 2, not 'cbwcore-bitmap' version 1" in refused(1, "import", disk, exported, "--name", "copy")
    assert list(listed(ok, disk)) == ["daily"]


def test_export_replaces_nothing(refused, disk, exported):
    before = exported.read_bytes()
    assert "File exists" in refused(1, "export", disk, "daily", exported)
    assert exported.read_bytes() == before
    assert "No such file" in refused(1, "export", disk, "daily", exported.parent / "in" / "none")
    assert "has no bitmap 'no'" in refused(1, "export", disk, "no", exported.parent / "new")
