"""The soak: hours of everything at once, from outside.

`python tests/soak.py --minutes N [--seed S] [--io psync|io_uring]`; needs root.

One process serves a disk by NBD; over it nbdfuse, a loop device, ext4, and fio that verifies what it wrote. Snapshots
of the frozen file system are taken, pulled by nbdcopy and compared with the disk as it was, broken by targets that may
take little, and dropped, at random. Another process makes chains of backups with a persistent bitmap and restores them;
it is killed now and then. Now and then `cbwcore serve` serves a disk of its own to fio and nbdcopy.

Exit status 1 after any mismatch, error, hang, or growth of memory, descriptors or threads. All that it started ends
with it, also on ctrl-C or SIGTERM."""

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Resources
from interop_support import COMMAND, MIB, nbdfuse, uri_of

from cbwcore.engines import choose_engine

PARTS = Path(__file__).with_name("soak_parts")
DISK = 96 * MIB
LIMIT = 120.0  # seconds after which something that must come counts as a hang
MEMORY_SLACK = 24 * MIB  # what is cached, and the allocator's
THREAD_SLACK = 16
MOST_SNAPSHOTS = 3


class Failure(Exception):  # noqa: N818
    """What the soak is there to find."""


class PullRefused(Failure):
    """A client was told that it does not get the snapshot, or the rest of it."""


class Interrupted(BaseException):
    """A signal."""


def command(*words, timeout=LIMIT, status=0):
    """The output of a program; Failure where it ends otherwise, or not."""
    words = [str(word) for word in words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, start_new_session=True)
    except subprocess.TimeoutExpired as e:
        raise Failure(f"hangs for {timeout} s: {' '.join(words)}") from e
    if status is not None and done.returncode != status:
        raise Failure(f"exit {done.returncode}: {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Usage(NamedTuple):
    memory: int  # resident bytes
    descriptors: int  # but for rings
    rings: int
    threads: int


class Part:
    """A process that answers by lines of JSON."""

    def __init__(self, script, *arguments):
        words = [sys.executable, str(PARTS / script), *map(str, arguments)]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True
        )
        self._rest = b""

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.answer(LIMIT)
        if answer is None:
            raise Failure(f"no answer to {request} within {LIMIT} s")
        if "error" in answer:
            raise Failure(f"{request}: {answer['error']}")
        return answer

    def answer(self, timeout):
        """The next line, or None; Failure where there will be none."""
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if not select.select([self.process.stdout], [], [], max(0, left))[0]:
                return None
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                raise Failure(f"{self.process.args[1]} ended with {self.process.wait()}:\n{self.stderr()}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def stderr(self):
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def usage(self):
        """Now, of /proc."""
        process = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        open_files = []
        for descriptor in os.listdir(process / "fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                open_files.append(os.readlink(process / "fd" / descriptor))
        rings = open_files.count("anon_inode:[io_uring]")
        memory = int(status["VmRSS"].split()[0]) * 1024
        return Usage(memory, len(open_files) - rings, rings, int(status["Threads"]))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        """By itself, in time. Nothing was written to stderr."""
        self.process.stdin.close()
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired as e:
            self.kill()
            raise Failure(f"{self.process.args[1]} does not end") from e
        if self.process.returncode or self.stderr():
            raise Failure(f"{self.process.args[1]} ended with {self.process.returncode}:\n{self.stderr()}")

    def close(self):
        if self.process.poll() is None:
            self.kill()
        self.errors.close()


class Soak:
    def __init__(self, minutes, seed, io, resources, stop):
        self.io = io
        self.end = time.monotonic() + minutes * 60
        self.seed = seed
        self.rng = random.Random(seed)
        self.resources = resources
        self.stop = stop
        self.failures = []
        self.counts = dict.fromkeys(("taken", "pulled", "broken", "dropped", "served", "killed", "fio"), 0)
        self.backups = {}
        self.latencies = []  # of the file system's writes, in ms: (median, 99 %, most) of each fio
        self.longest_wait = 0.0  # of a guest write for a snapshot, in s
        self.samples = {"host": [], "backups": []}
        self.began = time.monotonic()

    # ---- what there is ----

    def start(self):
        folder = Path(self.resources.tmpfs())
        self.pulls = Path(self.resources.directory())
        self.disk = folder / "disk"
        with open(self.disk, "wb") as f:
            f.truncate(DISK)
        self.socket = folder / "socket"
        self.host = Part("host.py", self.disk, self.socket, folder, self.io)
        self.resources.undo.callback(self.host.close)
        self.host.answer(LIMIT)
        fuse = nbdfuse(self.resources, uri_of(self.socket), str(folder / "fuse"))
        device = self.resources.loop(fuse)
        command("mkfs.ext4", "-q", device)
        self.mounted = self.resources.mount(device, str(folder / "mounted"))
        self.chains = Path(self.resources.tmpfs())
        self.jobs = None
        self.start_backups()
        self.resources.undo.callback(lambda: self.jobs.close())

    def start_backups(self):
        if self.jobs is not None:
            self.jobs.close()
        self.jobs = Part("backups.py", self.chains, self.rng.getrandbits(32))

    def going_on(self, seconds=0.0):
        """Wait; whether there is time left, nobody has stopped it, and nothing has failed."""
        self.stop.wait(max(0.0, min(seconds, self.end - time.monotonic())))
        return not (self.stop.is_set() or self.failures or time.monotonic() >= self.end)

    # ---- the threads ----

    def guard(self, call):
        """A thread; what it finds ends the soak."""

        def run():
            try:
                call()
            except Exception as e:
                self.failures.append(e if isinstance(e, Failure) else Failure(f"{call.__name__}: {e!r}"))

        thread = threading.Thread(target=run, name=call.__name__, daemon=True)
        thread.start()
        return thread

    def write_files(self):
        """fio on the file system, again and again; it reads back what it wrote."""
        number = 0
        while self.going_on():
            number += 1
            words = ["fio", "--name=soak", f"--directory={self.mounted}", "--rw=randrw", "--bsrange=4k-128k"]
            words += ["--size=12m", "--numjobs=2", "--ioengine=psync", "--direct=1"]
            words += [
                "--verify=crc32c",
                "--verify_backlog=32",
                "--verify_fatal=1",
                "--verify_state_save=0",  # else its files would go where we are
                "--fsync=64",
                "--rate=8m",
                f"--randseed={self.seed + number}",
            ]
            words += ["--output-format=json", "--group_reporting", "--loops=2"]
            done = command(*words, timeout=LIMIT * 2)
            job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
            if job["error"]:
                raise Failure(f"fio: error {job['error']}\n{done.stderr}")
            times = job["write"]["clat_ns"]
            self.latencies.append(
                (times["percentile"]["50.000000"] / 1e6, times["percentile"]["99.000000"] / 1e6, times["max"] / 1e6)
            )
            self.counts["fio"] += 1
            for path in Path(self.mounted).glob("soak.*"):
                path.unlink()

    def watch_backups(self):
        """What the other process tells of; now and then it is killed, and another takes over."""
        next_kill = time.monotonic() + self.rng.uniform(10, 30)
        while self.going_on():
            line = self.jobs.answer(LIMIT)
            if line is None:
                raise Failure(f"no backup within {LIMIT} s")
            self.backups[line["did"]] = self.backups.get(line["did"], 0) + 1
            if line.get("reason"):
                raise Failure(f"an incremental backup became a full one: {line['reason']}")
            if time.monotonic() > next_kill:
                self.jobs.kill()
                self.counts["killed"] += 1
                self.start_backups()
                next_kill = time.monotonic() + self.rng.uniform(10, 60)

    def measure(self):
        while self.going_on(1.0):
            self.samples["host"].append(self.host.usage())
            with contextlib.suppress(OSError, KeyError):  # it may just have been killed
                self.samples["backups"].append(self.jobs.usage())

    # ---- snapshots ----

    def take(self, name, options):
        """A snapshot of the file system at rest; the disk's digest at T0."""
        command("fsfreeze", "--freeze", self.mounted)
        try:
            self.host.ask(do="take", name=name, options=options)
            digest = sha256(self.disk)
        finally:
            command("fsfreeze", "--unfreeze", self.mounted)
        self.counts["taken"] += 1
        return digest

    def pull(self, name, digest):
        """Its bytes are those of T0, and a whole file system; PullRefused where there is no copy at all."""
        image = self.pulls / name
        done = command("nbdcopy", uri_of(self.socket, name), image, status=None)
        if done.returncode:
            image.unlink(missing_ok=True)
            raise PullRefused(f"snapshot {name} cannot be pulled: {done.stderr}")
        if sha256(image) != digest:
            raise Failure(f"snapshot {name} is not the disk at T0; see {self.keep(image)}")
        if self.rng.random() < 0.3:
            command("e2fsck", "-f", "-n", image)
        image.unlink()
        self.counts["pulled"] += 1

    def keep(self, image):
        return shutil.copy(image, tempfile.mkdtemp(prefix="soak-"))

    def drop(self, name, *, broken):
        answer = self.host.ask(do="drop", name=name)
        self.longest_wait = max(self.longest_wait, answer["longest_wait"])
        if answer["state"] == "broken" and not broken:
            raise Failure(f"snapshot {name} broke: errno {answer['errno']}")
        self.counts["dropped"] += 1

    def snapshots(self):
        """Some at a time, each for a while."""
        there, count = {}, 0  # name -> (digest, whether it may break)
        try:
            while self.going_on(self.rng.uniform(0, 1.5)):
                what = self.rng.random()
                if len(there) < MOST_SNAPSHOTS and (what < 0.5 or not there):
                    count += 1
                    name, small = f"snapshot{count}", self.rng.random() < 0.35
                    options = {"cluster_size": self.rng.choice([4096, 65536, 1 << 20])}
                    if small:
                        options["target_limit"] = self.rng.choice([1 << 20, 4 << 20])
                        options["on_cbw_error"] = "break-snapshot"
                    there[name] = self.take(name, options), small
                elif what < 0.8 and there:
                    self.use(self.rng.choice(list(there)), there)
                elif there:
                    name = self.rng.choice(list(there))
                    self.drop(name, broken=there.pop(name)[1])
        finally:
            for name, (_, small) in there.items():
                self.drop(name, broken=small)

    def use(self, name, there):
        """A snapshot that breaks is refused from then on (R7); what was copied whole is T0, broken meanwhile or not."""
        digest, may_break = there[name]
        try:
            self.pull(name, digest)
        except PullRefused:
            if not may_break or self.host.ask(do="state", name=name)["state"] != "broken":
                raise
            self.counts["broken"] += 1
            self.drop(name, broken=True)
            del there[name]

    # ---- cbwcore serve ----

    def serve(self):
        """The command, with guests that write by NBD while the snapshot is pulled."""
        folder = Path(self.resources.tmpfs())
        while self.going_on(self.rng.uniform(1, 8)):
            image, socket = folder / "disk", folder / "socket"
            image.write_bytes(random.Random(self.rng.random()).randbytes(4 * MIB) * 4)
            t0 = sha256(image)
            words = [*COMMAND, image, "--socket", socket, "--target", folder / "target"]
            server = subprocess.Popen(
                list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
            try:
                if not select.select([server.stdout], [], [], LIMIT)[0] or not server.stdout.readline():
                    raise Failure(f"cbwcore serve is not ready: {server.stderr.read1()}")
                self.use_server(socket, folder / "pulled", t0)
                server.send_signal(signal.SIGTERM)
                errors = server.communicate(timeout=LIMIT)[1]
                if server.returncode or errors:
                    raise Failure(f"cbwcore serve ended with {server.returncode}: {errors}")
            except subprocess.TimeoutExpired as e:
                raise Failure("cbwcore serve does not end") from e
            finally:
                server.kill()
                server.wait()
            (folder / "target").unlink()
            self.counts["served"] += 1

    def use_server(self, socket, pulled, t0):
        words = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri_of(socket)}", "--rw=randwrite", "--bs=4k"]
        words += ["--iodepth=8", "--size=16m", "--io_size=4m", "--verify=crc32c", "--output-format=json"]
        words += ["--verify_state_save=0"]  # as above
        fio = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            command("nbdcopy", uri_of(socket, "snapshot"), pulled)
            output, errors = fio.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired as e:
            raise Failure("fio over NBD hangs") from e
        finally:
            fio.kill()
            fio.wait()
        if fio.returncode:
            raise Failure(f"fio over NBD: {fio.returncode}\n{output.decode()}{errors.decode()}")
        if sha256(pulled) != t0:
            raise Failure("what cbwcore serve exports as the snapshot is not T0")

    # ---- the whole ----

    def run(self):
        self.start()
        time.sleep(1)
        before = self.host.usage()
        calls = [self.write_files, self.watch_backups, self.measure, self.snapshots, self.serve]
        threads = [self.guard(call) for call in calls]
        table = self.began
        while any(thread.is_alive() for thread in threads):
            if time.monotonic() > self.end + 3 * LIMIT:
                alive = [thread.name for thread in threads if thread.is_alive()]
                raise Failure(f"hangs at the end: {alive}")
            if time.monotonic() > table:
                self.print_row()
                table += max(10.0, (self.end - self.began) / 20)
            for thread in threads:
                thread.join(0.2)
        self.print_row()
        if self.failures:
            raise self.failures[0]
        if self.stop.is_set():
            raise Interrupted
        self.check_done()
        self.check_growth(before)
        self.jobs.end()

    def check_done(self):
        by_chance = ("broken", "killed") if self.end - self.began < 300 else ()
        idle = [what for what, count in self.counts.items() if not count and what not in by_chance]
        if idle or not {"full", "incremental", "restored"} <= self.backups.keys():
            raise Failure(f"it has done too little: {self.counts}, {self.backups}")

    def check_growth(self, before):
        """Memory, threads and rings do not go on growing (the server keeps those that it once needed); other
        descriptors are what they were without snapshots."""
        for who, samples in self.samples.items():
            quarter = max(1, len(samples) // 4)
            for figure, slack in (("memory", MEMORY_SLACK), ("threads", THREAD_SLACK), ("rings", THREAD_SLACK)):
                early = max(getattr(sample, figure) for sample in samples[quarter : 2 * quarter + 1])
                late = max(getattr(sample, figure) for sample in samples[-quarter:])
                if late > early + slack:
                    raise Failure(f"{who} has grown: {figure} from {early} to {late}")
        end = time.monotonic() + 20
        while (after := self.host.usage()).descriptors > before.descriptors:
            if time.monotonic() > end:
                raise Failure(f"{after.descriptors} descriptors in the end, {before.descriptors} at the beginning")
            time.sleep(0.2)

    def print_row(self):
        if not self.samples["host"]:
            columns = ("s", "MiB", "fds", "rings", "threads", "MiB/job", "p50 ms", "p99 ms", "max ms", "wait ms")
            print(" ".join(f"{column:>7}" for column in columns), "done", flush=True)
            return
        memory, *counts = self.samples["host"][-1]
        jobs = self.samples["backups"][-1].memory if self.samples["backups"] else 0
        times = self.latencies[-1] if self.latencies else (0, 0, 0)
        most = max((each[2] for each in self.latencies), default=0)
        figures = [time.monotonic() - self.began, memory / MIB, *counts, jobs / MIB, *times[:2], most]
        figures.append(self.longest_wait * 1000)
        done = ", ".join(f"{count} {what}" for what, count in {**self.counts, **self.backups}.items() if count)
        print(" ".join(f"{figure:7.1f}" if isinstance(figure, float) else f"{figure:7}" for figure in figures), done)
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--io", choices=["psync", "io_uring"], help="the server's engine (default: by the seed)")
    args = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    io = args.io or random.Random(seed).choice(["psync", choose_engine("auto", direct=True)[0]])
    print(f"soak: {args.minutes} minutes, --seed {seed} --io {io}", flush=True)
    needed = ("fio", "nbdfuse", "nbdcopy", "mkfs.ext4", "fsfreeze", "e2fsck", "fusermount3", "losetup")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing or os.geteuid():
        print(f"soak: it needs root, and {', '.join(missing or needed)}", file=sys.stderr)
        return 2
    stop = threading.Event()
    # Programs started from here on do not get ctrl-C: they are ended in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    threading.Thread(target=lambda: (signal.sigwait([signal.SIGINT]), stop.set()), daemon=True).start()
    resources = Resources()
    try:
        soak = Soak(args.minutes, seed, io, resources, stop)
        soak.run()
    except Interrupted:
        print("soak: stopped", file=sys.stderr)
        return 130
    except (Failure, RuntimeError, AssertionError) as e:
        print(f"soak: FAILED, --seed {seed} --io {io}: {e}", file=sys.stderr)
        return 1
    finally:
        resources.close()
    print("soak: clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
