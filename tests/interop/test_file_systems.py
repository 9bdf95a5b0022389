"""ext4 and xfs on the disk's export, by nbdfuse and a loop device: what the kernel and the file systems' own checkers
say of a snapshot that was pulled while the file system was in use."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from interop_support import KIB, LIMIT, MIB, nbdfuse, sha256
from programs_support import run

KINDS = {"ext4": 64 * MIB, "xfs": 320 * MIB}  # 300 MiB is the least for xfs
CHECKS = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n", "-f"]}
WITHOUT_JOURNAL = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}
WITH_JOURNAL = {"ext4": "rw", "xfs": "rw,nouuid"}

# Writes files 0 to 199 below a directory and tells of each once it is durable; halfway it waits for a line.
WRITER = """
import os, random, sys

def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

home = sys.argv[1]
for number in range(200):
    if number == 100:
        sys.stdin.readline()
    folder = os.path.join(home, f"d{number % 7}")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, str(number)), "wb") as f:
        f.write(random.Random(number).randbytes(random.Random(number).randrange(1, 200_000)))
    for path in f.name, folder, home:
        sync(path)
    print(number, flush=True)
    if number > 40 and number % 3 == 0:  # what it deletes, it soon writes again
        os.unlink(os.path.join(home, f"d{(number - 40) % 7}", str(number - 40)))
"""
TOLD = 60  # files that are durable at T0


def written_by_writer(number):
    return random.Random(number).randbytes(random.Random(number).randrange(1, 200_000))


# ---- a file system on an export ----


class Guest:
    """A mounted file system on an export, its files, and what they should be."""

    def __init__(self, kind, host, resources, place):
        self.kind = kind
        self.host = host
        self.resources = resources
        self.place = place
        device = resources.loop(nbdfuse(resources, host.uri("disk"), str(place / "fuse")))
        run("mkfs." + kind, "-q", device)
        self.home = self.mount(device, "mounted")

    def snapshot(self):
        """T0 is now; exported as `snapshot`."""
        snapshot = self.host.disk.snapshot(self.place / "target")
        self.host.server.add_export("snapshot", snapshot)
        return snapshot

    def frozen_snapshot(self):
        """The same, with the file system at rest; also the digest of the disk at T0."""
        self.freeze()
        try:
            self.snapshot()
            return sha256(self.host.disk.path)
        finally:
            self.thaw()

    def freeze(self):
        run("fsfreeze", "--freeze", self.home)

    def thaw(self):
        run("fsfreeze", "--unfreeze", self.home)

    def trim(self):
        """Discard what is free, where the way down to the disk has discards."""
        run("fstrim", self.home)

    def mount(self, device, name, options="rw"):
        """The directory where it is mounted now."""
        where = str(self.place / name)
        os.mkdir(where)
        run("mount", "-o", options, device, where)
        self.resources.undo.callback(unmount, where)
        return where

    def files_of(self, image, options):
        """The digests of the files of a file system in an image, mounted for a moment."""
        where = self.mount(self.resources.loop(image), f"image-{options.partition(',')[0]}", options)
        try:
            return digests(where)
        finally:
            unmount(where)
            os.rmdir(where)


def unmount(where):
    """Also where a failed test has left a file open; nothing where it is not mounted any more."""
    if os.path.ismount(where) and subprocess.run(["umount", where], capture_output=True, timeout=LIMIT).returncode:
        run("umount", "--lazy", where)


@pytest.fixture(params=KINDS)
def guest(request, host, image, place, resources, needs, program):
    """A new file system, mounted. Taken down before the server, whose fixture came first."""
    kind = request.param
    program("nbdfuse", "nbdcopy", "fusermount3", f"mkfs.{kind}", CHECKS[kind][0], "fsfreeze", "fstrim")
    path = image(b"")
    os.truncate(path, KINDS[kind])
    hosted = host(path)
    hosted.server.add_export("disk", hosted.disk, writable=True)
    with needs():
        return Guest(kind, hosted, resources, place)


def check(kind, image):
    """The file system's own checker finds nothing to say of an image."""
    done = run(*CHECKS[kind], image)
    said = (done.stdout + done.stderr).lower()
    assert not any(word in said for word in ("would", "bad", "corrupt", "fix", "error")), said


# ---- files ----


def make_files(home, rng, count=60):
    """A tree with files of all sizes, some of them sparse, links among them."""
    for number in range(count):
        folder = Path(home, *(f"d{rng.randrange(4)}" for _ in range(rng.randrange(3))))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"f{number}"
        file.write_bytes(rng.randbytes(rng.choice([0, 1, 100, 4 * KIB, 70_001, 300 * KIB, MIB])))
        if number % 9 == 0:
            os.truncate(file, file.stat().st_size + 200 * KIB)
        if number % 11 == 0:
            (folder / f"l{number}").symlink_to(file.name)
    run("sync", "--file-system", home)


def change_files(home, rng):
    """Rewrite in place, append, cut, rename and delete what is there; new files where there is room."""
    files = sorted(path for path in Path(home).rglob("f*") if path.is_file() and not path.is_symlink())
    for file in files:
        match rng.randrange(6):
            case 0:
                file.unlink()
            case 1:
                with open(file, "r+b") as f:
                    f.write(rng.randbytes(file.stat().st_size))
                    os.fsync(f.fileno())
            case 2:
                with open(file, "ab") as f:
                    f.write(rng.randbytes(100_000))
            case 3:
                os.truncate(file, file.stat().st_size // 2)
            case 4:
                file.rename(file.with_name(f"renamed-{file.name}"))
            case _:
                pass
    shutil.rmtree(Path(home, "d1"), ignore_errors=True)
    make_files(Path(home, "new"), rng, 30)


def digests(home):
    """All that is below a directory: the digest of each file, the target of each link."""
    found = {}
    for path in sorted(Path(home).rglob("*")):
        name = str(path.relative_to(home))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "directory" if path.is_dir() else sha256(path)
    found.pop("lost+found", None)
    return found


# ---- the tests ----


def test_pulled_while_files_change(guest, background, rng):
    """T0 with the file system at rest: the pulled image is T0 to the byte, without a flaw, and has the files of T0."""
    make_files(guest.home, rng)
    before = digests(guest.home)
    t0 = guest.frozen_snapshot()
    pulled = str(guest.place / "pulled")
    pull = background.start("nbdcopy", guest.host.uri("snapshot"), pulled)
    change_files(guest.home, rng)
    guest.trim()
    background.finish(pull)
    again = str(guest.place / "again")
    run("nbdcopy", guest.host.uri("snapshot"), again)
    assert sha256(pulled) == sha256(again) == t0
    assert guest.files_of(pulled, WITHOUT_JOURNAL[guest.kind]) == before
    if guest.kind == "ext4":  # a frozen xfs has records in its journal
        check(guest.kind, pulled)
    assert guest.files_of(pulled, WITH_JOURNAL[guest.kind]) == before
    check(guest.kind, pulled)

    after = digests(guest.home)
    assert after != before
    unmount(guest.home)
    check(guest.kind, guest.host.disk.path)
    assert guest.files_of(guest.host.disk.path, WITHOUT_JOURNAL[guest.kind]) == after


def test_pulled_from_a_file_system_in_use(guest, background):
    """T0 in the middle of writing, as after a power cut: the journal brings the image to a flawless file system, with
    every file that was durable before T0."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, guest.home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        told = iter(writer.stdout)
        assert [int(next(told)) for _ in range(TOLD)] == list(range(TOLD))
        snapshot = guest.snapshot()
        pulled = str(guest.place / "pulled")
        pull = background.start("nbdcopy", guest.host.uri("snapshot"), pulled)
        writer.communicate("go on\n", timeout=LIMIT)
        background.finish(pull)
    finally:
        writer.kill()
        writer.communicate()
    assert writer.returncode == 0
    assert snapshot.stats().cbw_bytes > 0
    again = str(guest.place / "again")
    run("nbdcopy", guest.host.uri("snapshot"), again)
    assert sha256(pulled) == sha256(again)

    found = guest.files_of(pulled, WITH_JOURNAL[guest.kind])
    check(guest.kind, pulled)
    for number in range(TOLD):
        name = f"d{number % 7}/{number}"
        if name in found or number % 3 != 2:  # of these some were deleted by then
            assert found[name] == sha256(written_by_writer(number))
