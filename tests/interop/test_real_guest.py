"""A virtual machine with the Debian kernel: its virtio disk is the disk's export while others pull the snapshot.

The machine's whole system is an initramfs made here: busybox, the modules of its disk, and a script of seeded writes.
"""

import gzip
import os
import random
import re
import stat
import subprocess
import time

import interop_sources as sources
import pytest
from interop_support import KIB, MIB, assert_same, mixed, sha256
from programs_support import run

SIZE = 32 * MIB
BLOCK = 4 * KIB  # what writes and discards are multiples of
PAYLOAD = 2 * MIB
STEPS = 120  # in each half
CLOCK_TICK = 10_000_000  # ns by which a file's time may be late
LIMIT = 60.0  # seconds after which what the machine must do counts as a hang
DRIVERS = "virtio_pci", "virtio_blk"
PROGRAMS = ["blkdiscard", "cat", "dd", "insmod", "mount", "poweroff", "sha256sum", "sleep", "sync"]

INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
fail() { echo "guest: failed: $*"; exit 1; }
for module in $(cat /modules/order); do insmod /modules/$module.ko || fail insmod $module; done
tries=0
until [ -b /dev/vda ]; do tries=$((tries + 1)); [ $tries -lt 100 ] || fail no disk; sleep 0.1; done
put() { dd if=/payload of=/dev/vda bs=4k conv=notrunc,$1 skip=$2 seek=$3 count=$4 2>/dev/null || fail put $*; }
put_direct() { dd if=/payload of=/dev/vda bs=4k conv=notrunc oflag=direct skip=$2 seek=$3 count=$4 2>/dev/null \\
  || fail put_direct $*; }
give_up() { blkdiscard -o $1 -l $2 /dev/vda || fail give_up $*; }
echo "guest: begins"
. /first
sync
echo "guest: half of it is written"
read line
. /second
sync
echo 3 >/proc/sys/vm/drop_caches
echo "guest: disk holds $(sha256sum </dev/vda)"
poweroff -f
"""


def seeded_steps(rng, content, payload, discards):
    """Lines for the machine's script, and what they do, done to ``content``."""
    for _ in range(STEPS):
        if discards and rng.random() < 0.15:
            length = rng.choice([BLOCK, 64 * KIB, 128 * KIB])
            at = rng.randrange(0, SIZE - length + 1, BLOCK)
            content[at : at + length] = bytes(length)
            yield f"give_up {at} {length}"
        else:
            length = rng.choice([BLOCK, 2 * BLOCK, 17 * BLOCK, 300 * KIB])
            at = rng.randrange(0, SIZE - length + 1, BLOCK)
            source = rng.randrange(0, PAYLOAD - length + 1, BLOCK)
            content[at : at + length] = payload[source : source + length]
            how = rng.choice(["put notrunc", "put fsync", "put_direct -"])
            yield f"{how} {source // BLOCK} {at // BLOCK} {length // BLOCK}"


# ---- the machine ----


def cpio(files):
    """An archive as the kernel unpacks it at the start: path → (mode, content), folders before what is in them."""
    archive = bytearray()
    for number, (path, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        name = path.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def modules(files):
    """name → content of the drivers and all that they need, in the order of loading; what is built in is not there."""
    there = {path.stem: path for path in files.rglob("*.ko")}
    needed = {}

    def add(name):
        if name in there and name not in needed:
            content = there[name].read_bytes()
            for other in re.search(rb"\0depends=([^\0]*)\0", content)[1].decode().split(","):
                add(other)
            needed[name] = content

    for name in DRIVERS:
        add(name)
    return needed


def initramfs(files, more):
    """The machine's system: busybox, modules and init of ``files``, the fetched ones, and ``more`` files."""
    drivers = modules(files)
    folder, program, data = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    system = dict.fromkeys(("bin", "dev", "proc", "modules"), (folder, b""))
    system["bin/busybox"] = program, (files / "bin/busybox").read_bytes()
    system |= {f"bin/{name}": (stat.S_IFLNK | 0o777, b"busybox") for name in PROGRAMS}
    system["init"] = program, INIT.encode()
    system["modules/order"] = data, "\n".join(drivers).encode()
    system |= {f"modules/{name}.ko": (data, content) for name, content in drivers.items()}
    return cpio(system | {name: (data, content) for name, content in more.items()})


class Machine:
    """A running machine and its serial console."""

    def __init__(self, kernel, initrd, drive, folder):
        self._console = folder / "console"
        with open(self._console, "wb") as console:
            self._process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-accel", "tcg", "-m", "256M", "-nodefaults", "-no-user-config"),
                    *("-display", "none", "-serial", "stdio", "-no-reboot"),
                    *("-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1"),
                    *drive,
                ],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
            )

    @property
    def console(self):
        return self._console.read_text(errors="replace")

    @property
    def running(self):
        return self._process.poll() is None

    def wait_for(self, text):
        """Wait until the machine has said it."""
        end = time.monotonic() + LIMIT
        while text not in self.console:
            assert self.running, f"the machine ended with {self._process.returncode}: {self.console}"
            assert time.monotonic() < end, f"not within {LIMIT} s: {text!r}; the machine said {self.console}"
            time.sleep(0.02)

    def say(self, line):
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def wait_for_end(self):
        """Wait until it has powered itself off."""
        try:
            assert self._process.wait(LIMIT) == 0, self.console
        except subprocess.TimeoutExpired:
            pytest.fail(f"the machine does not end: {self.console}")

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


@pytest.fixture
def start(place, needs, program):
    """``start(drive, **files)``: a machine with that disk (options of QEMU) and files in its root; gone at the end."""
    program("qemu-system-x86_64", "apt-get", "dpkg", "nbdcopy")
    machines = []

    def start(drive, **more):
        with needs():
            files = sources.guest_files()
        (kernel,) = (files / "boot").glob("vmlinuz-*")
        initrd = place / "initrd"
        initrd.write_bytes(gzip.compress(initramfs(files, more), 1))
        machines.append(Machine(kernel, initrd, drive, place))
        return machines[-1]

    yield start
    for machine in machines:
        machine.kill()


# ---- the test ----


def as_documented(server):
    """The line of docs/nbd.md; it does not hand discards on."""
    return ["-drive", f"file=nbd+unix:///disk?socket={server.socket},format=raw,if=virtio"]


def with_discards(server):
    nbd = f"driver=nbd,node-name=d0,server.type=unix,server.path={server.socket},export=disk,discard=unmap"
    return ["-blockdev", nbd, "-device", "virtio-blk-pci,drive=d0"]


@pytest.mark.parametrize("drive", [as_documented, with_discards], ids=lambda drive: drive.__name__)
def test_a_machine_writes_while_its_snapshot_is_pulled(serve, image, start, place, rng, drive):
    t0 = mixed(SIZE)
    path = image(t0)
    server = serve(path)
    pulled = place / "pulled"
    overlaps = []  # of each pull: whether the guest wrote in it

    def pull():
        began = time.time_ns()
        run("nbdcopy", server.uri("snapshot"), pulled)
        overlaps.append(os.stat(path).st_mtime_ns > began + CLOCK_TICK)
        assert_same(pulled, t0)
        os.unlink(pulled)

    def pull_until(text):
        while text not in machine.console:
            assert machine.running, f"the machine ended: {machine.console}"
            pull()

    content, payload = bytearray(t0), random.Random(rng.random()).randbytes(PAYLOAD)
    discards = drive is with_discards
    first, second = ("\n".join(seeded_steps(rng, content, payload, discards)).encode() for _ in range(2))
    machine = start(drive(server), payload=payload, first=first, second=second)
    machine.wait_for("guest: begins")
    pull_until("guest: half of it is written")
    assert any(overlaps), f"none of {len(overlaps)} pulls overlapped a write of the first half"
    pull()
    del overlaps[:]
    machine.say(b"go on\n")
    pull_until("guest: disk holds")
    assert any(overlaps), f"none of {len(overlaps)} pulls overlapped a write of the second half"
    machine.wait_for_end()

    assert "failed" not in machine.console
    assert "error" not in machine.console.lower(), machine.console
    assert_same(path, bytes(content))
    said = re.search(r"guest: disk holds ([0-9a-f]{64})", machine.console)
    assert said, machine.console
    assert said[1] == sha256(path)
    pull()
