"""The machine dies between any two steps of the bitmap file."""

import json
import os
import random

import google_crc32c
from bitmap_support import (
    HEADER,
    SIZE,
    SLOT,
    UNIT,
    content,
    freeze,
    granules,
    sidecar,
)

import cbwcore
from cbwcore import bitmap_file


class Machine:
    """What of the bitmap file is on storage at any time: what the last fsync found, and of what came after any part."""

    def __init__(self, path, monkeypatch):
        self.path = path
        self.durable = b""
        self.deaths = []  # (where, image)
        self.rng = random.Random(5)
        monkeypatch.setattr(bitmap_file, "sync", self.sync)
        monkeypatch.setattr(bitmap_file, "step", self.step)

    def look(self):
        for name in (sidecar(self.path), sidecar(self.path) + ".partial"):
            if os.path.exists(name):
                return name, content(name)
        return sidecar(self.path), b""

    def sync(self, fd):
        os.fsync(fd)
        where = os.readlink(f"/proc/self/fd/{fd}")
        if where.startswith(sidecar(self.path)):
            self.durable = content(where)
        self.deaths.append(("after fsync", *self.torn(0)))

    def step(self, what):
        self.deaths += [(what, *self.torn(share)) for share in (0, 0.3, 0.7, 1)]

    def torn(self, share):
        """The file where of each sector that has changed since the last fsync ``share`` has reached storage."""
        name, now = self.look()
        image = bytearray(self.durable.ljust(len(now), b"\0"))
        for at in range(0, len(now), 512):
            if now[at : at + 512] != image[at : at + 512] and self.rng.random() < share:
                image[at : at + 512] = now[at : at + 512]
        return name, bytes(image)


def test_the_machine_dies_at_any_step(place, monkeypatch):
    """What is left is never short: it covers all, or is inconsistent; and never a file that cannot be read."""
    path = str(place / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    machine = Machine(path, monkeypatch)
    written = set()
    must = []  # for each death: what a consistent bitmap covers

    def write(unit):
        disk.pwrite(b"x", unit * UNIT)
        written.add(unit)
        machine.step("write")
        note()

    def note():
        must.extend([frozenset(written)] * (len(machine.deaths) - len(must)))

    for life in range(3):
        disk = cbwcore.Disk(path)
        note()
        if life == 0:
            disk.bitmaps.add("daily", persistent=True)
            note()
        write(10 * life)
        if life == 1:
            _, job = freeze(disk, "daily")
            write(12)
            before = set(written)
            written -= {0, 1, 10}  # from the commit on, at the latest
            job.commit("first")
            note()
            assert before == {0, 1, 10, 12}
        if life == 2:
            _, job = freeze(disk, "daily")
            write(22)
            job.merge()
        write(10 * life + 1)
        disk.close()
        note()
    status = os.stat(path)
    monkeypatch.undo()
    kept = content(sidecar(path))
    monkeypatch.setattr(bitmap_file, "boot_id", lambda: "another")
    assert len(machine.deaths) == len(must) > 100
    outcomes = set()
    for (where, name, image), units in zip(machine.deaths, must, strict=True):
        for each in (sidecar(path), sidecar(path) + ".partial"):
            if os.path.exists(each):
                os.unlink(each)
        with open(name, "wb") as f:
            f.write(image)
        for clean_mtime in [None] if not image else {e["mtime_ns"] for e in found_in(image)}:
            if clean_mtime is not None:
                os.utime(path, ns=(status.st_atime_ns, clean_mtime))
        with cbwcore.Disk(path, read_only=True) as disk:
            assert name.endswith(".partial") or disk.bitmaps.problem is None, where
            bitmap = disk.bitmaps.get("daily")
            outcome = "absent" if bitmap is None else "inconsistent" if bitmap.inconsistent else "usable"
            outcomes.add(outcome)
            if outcome == "usable":
                assert granules(bitmap) >= units, where
    assert outcomes == {"absent", "inconsistent", "usable"}
    with open(sidecar(path), "wb") as f:
        f.write(kept)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with cbwcore.Disk(path) as disk:
        assert granules(disk.bitmaps["daily"]) == {11, 12, 20, 21, 22}


def found_in(image):
    """The directories that can be read."""
    for at in (0, SLOT):
        magic, _, length, _, crc = HEADER.unpack_from(image.ljust(SLOT * 2, b"\0"), at)
        text = image[at + HEADER.size : at + HEADER.size + length]
        if magic == b"CBWBITS\n" and crc == google_crc32c.value(image[at : at + 24] + text):
            yield json.loads(text)


def test_the_order_of_things(path, monkeypatch):
    """In use before a write can be recorded; the disk, then the bits, then the directory that calls them clean."""
    calls = []

    def sync(fd):
        calls.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        os.fsync(fd)

    def write_all(fd, data, offset):
        bitmap = cbwcore.bitmap_file.HEADER.size
        calls.append(("write", offset, json.loads(data[bitmap:])["in_use"]))
        return real(fd, data, offset)

    real = bitmap_file.write_all
    monkeypatch.setattr(bitmap_file, "sync", sync)
    monkeypatch.setattr(bitmap_file, "write_all", write_all)
    disk = cbwcore.Disk(path)
    name = os.path.basename(sidecar(path))
    first, second = (c[1] for c in calls if c[0] == "write")
    assert {first, second} == {0, SLOT}
    assert calls == [("write", first, True), ("sync", name), ("write", second, True), ("sync", name)]
    for begin in (lambda: disk.bitmaps.add("new", persistent=True), lambda: freeze(disk, "new")):
        calls.clear()
        begin()
        assert [c[0] for c in calls] == ["sync", "write", "sync", "write", "sync"], (
            "an area is durable before it is named"
        )
    calls.clear()
    disk.close()
    assert calls[:2] == [("sync", "disk"), ("sync", name)]
    assert [c[2] for c in calls if c[0] == "write"] == [False, False]
    assert calls[-1] == ("sync", name)
