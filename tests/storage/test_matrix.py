"""The engine on every kind of storage: what the guest reads, what the snapshot reads, what is on the target."""

import errno
import fcntl
import io
import mmap
import os
import random
import shutil
import threading

import pytest

import cbwcore
from cbwcore._cbwcore import FaultPlan

CLUSTER = 64 * 1024
SIZE = 8 * CLUSTER + 12_345


def sparse_pattern(rng, size):
    """Data and runs of zeroes, in pieces that fit no block."""
    content = bytearray(size)
    offset = 0
    while offset < size:
        end = min(size, offset + rng.randrange(1, 100_000))
        if rng.random() < 0.6:
            content[offset:end] = rng.randbytes(end - offset)
        offset = end
    return bytes(content)


def aligned(data):
    """Page-aligned memory, which O_DIRECT takes as it is."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory.write(data)
    return memoryview(memory)[: len(data)]


def random_range(rng, size):
    """Mostly short and unaligned; at times whole blocks, many clusters, or up to the very end."""
    kind = rng.randrange(5)
    if kind == 0:
        offset = rng.randrange(0, size, 4096)
        return offset, min(4096 * rng.randrange(1, 9), size - offset)
    offset = rng.randrange(size)
    if kind == 1:
        return offset, size - offset
    longest = 3 * CLUSTER if kind == 2 else 5000
    return offset, min(rng.randrange(1, longest), size - offset)


def apply_request(rng, disk, model):
    """One random guest request, to the disk and to the model."""
    offset, length = random_range(rng, len(model))
    end = offset + length
    request = rng.choice(["write", "write", "aligned-write", "zero", "unmap", "discard", "fua", "flush"])
    if request in ("write", "aligned-write", "fua"):
        data = rng.randbytes(length)
        disk.pwrite(aligned(data) if request == "aligned-write" else data, offset, fua=request == "fua")
        model[offset:end] = data
    elif request in ("zero", "unmap"):
        disk.pwrite_zeroes(offset, length, may_unmap=request == "unmap", fua=rng.random() < 0.2)
        model[offset:end] = bytes(length)
    elif request == "discard":
        before = bytes(model[offset:end])
        disk.discard(offset, length)
        after = disk.pread(length, offset)
        assert all(a in (b, 0) for a, b in zip(after, before, strict=True)), "a discard may only zero or do nothing"
        model[offset:end] = after
    else:
        disk.flush()


def make_target(storage, kind, rng, size):
    """A target's path: not there yet, or full of what must never be read from it."""
    if kind == "new":
        return storage.new_path()
    slack = rng.randrange(10_000) if kind == "old" else 0
    garbage = rng.randbytes(-(-(size + slack) // 4096) * 4096 if kind == "device" else size + slack)
    return storage.file(garbage) if kind == "old" else storage.device(garbage)


@pytest.mark.parametrize("target_kind", ["new", "old", "device"])
def test_a_backup_equals_t0_whatever_the_guest_did(storage, target_kind, rng, assert_status):
    t0 = sparse_pattern(rng, storage.size(SIZE))
    disk = storage.disk(t0)
    target = make_target(storage, target_kind, rng, len(t0))
    beyond = os.open(target, os.O_RDONLY) if target_kind != "new" else None
    tail = os.pread(beyond, 1 << 20, len(t0)) if beyond is not None else b""
    model = bytearray(t0)
    with disk.snapshot(target, cluster_size=rng.choice([4096, CLUSTER])) as snapshot:
        for _ in range(40):
            apply_request(rng, disk, model)
            offset, length = random_range(rng, len(t0))
            assert snapshot.pread(length, offset) == t0[offset : offset + length]
            assert disk.pread(length, offset) == model[offset : offset + length]
        backup = io.BytesIO()
        with snapshot.open() as source:
            shutil.copyfileobj(source, backup)
        assert backup.getvalue() == t0
        assert_status(snapshot, t0)
        assert_status(disk, bytes(model))
        assert disk.pread(disk.size, 0) == model
    if beyond is not None:
        assert os.pread(beyond, 1 << 20, len(t0)) == tail, "past the disk's end the target is not ours"
        os.close(beyond)
    disk.flush()
    path = disk.path
    disk.close()
    with open(path, "rb") as f:
        assert f.read() == model


@pytest.mark.parametrize("allocated", [False, True], ids=["sparse", "allocated"])
def test_holes_of_a_target_are_left_alone(storage, allocated):
    """From its first data on it is made to read as zeroes; tmpfs is not asked where they are (R11)."""
    t0 = bytes(4 * CLUSTER)
    target = storage.file(b"")
    with open(target, "r+b") as f:
        if allocated:
            os.posix_fallocate(f.fileno(), 0, len(t0))
        f.truncate(len(t0))
        os.pwrite(f.fileno(), b"garbage" * 1000, CLUSTER)
    disk = storage.open(storage.image(t0))
    with disk.snapshot(target) as snapshot:
        plan = FaultPlan()
        snapshot._inject(plan)
        on_tmpfs = storage.kind == "tmpfs" or storage.is_device
        if not on_tmpfs:
            plan.error("seek", errno.EIO, times=1)
            with pytest.raises(cbwcore.CopyBeforeWriteError, match="target-write"):
                disk.pwrite(b"x" * 4096, 0)
            plan.forget_calls()
        disk.pwrite(b"x" * len(t0), 0)
        start = 0 if on_tmpfs else CLUSTER
        assert [call for call in plan.calls() if call[0] in ("pwrite", "zero")] == [("zero", start, len(t0) - start)]
        assert snapshot.pread(len(t0), 0) == t0
        snapshot._inject(None)
    with open(target, "rb") as f:
        assert f.read() == t0


@pytest.mark.parametrize("request_kind", ["zeroes", "zeroes-unmap", "discard"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, CLUSTER), (4096, 60 * 1024), (1, 4095), (CLUSTER - 1, 2), (1000, 3 * CLUSTER), (SIZE - 5000, None), (0, None)],
    ids=["cluster", "4k-60k", "inside-a-block", "two-bytes", "many", "tail", "all"],
)
def test_zeroes_and_discards_are_guest_writes(storage, request_kind, offset, length, rng, assert_status):
    t0 = rng.randbytes(storage.size(SIZE)).replace(b"\0", b"\1")
    disk = storage.disk(t0)
    length = disk.size - offset if length is None else length
    with disk.snapshot(storage.new_path()) as snapshot:
        if request_kind == "discard":
            disk.discard(offset, length)
        else:
            disk.pwrite_zeroes(offset, length, may_unmap=request_kind == "zeroes-unmap")
            assert disk.pread(length, offset) == bytes(length)
        assert disk.pread(offset, 0) == t0[:offset]
        end = offset + length
        assert disk.pread(disk.size - end, end) == t0[end:]
        assert snapshot.pread(snapshot.size, 0) == t0
        assert not any(extent.zero for extent in assert_status(snapshot, t0))


def test_the_status_of_a_snapshot_ignores_later_holes_of_the_disk(storage, rng, assert_status):
    """The sequence that QEMU 7.2 gets wrong: `write -z -u 4k 60k`, then block status of the snapshot (R20)."""
    t0 = rng.randbytes(storage.size(4 * CLUSTER)).replace(b"\0", b"\1")
    disk = storage.disk(t0)
    with disk.snapshot(storage.new_path()) as snapshot:
        disk.pwrite_zeroes(4096, 60 * 1024, may_unmap=True)
        extents = assert_status(snapshot, t0)
        assert [(e.offset, e.length, e.data, e.zero) for e in extents] == [(0, disk.size, True, False)]
        copied_as_told = b"".join(bytes(e.length) if e.zero else snapshot.pread(e.length, e.offset) for e in extents)
        assert copied_as_told == t0


def test_the_status_of_a_snapshot_ignores_later_data_on_the_disk(storage, assert_status):
    t0 = bytes(storage.size(4 * CLUSTER))
    path = storage.image(t0)
    if not storage.is_device:
        os.truncate(path, 0)
        os.truncate(path, len(t0))
    disk = storage.open(path)
    with disk.snapshot(storage.new_path()) as snapshot:
        disk.pwrite(b"x" * 5000, CLUSTER + 1)
        assert snapshot.pread(disk.size, 0) == t0
        extents = assert_status(snapshot, t0)
        if not storage.is_device:
            assert all(extent.zero for extent in extents)
        assert snapshot.stats().target_bytes == 0, "old zeroes cost a new target nothing (R11)"


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4097, CLUSTER - 1, CLUSTER + 1, 3 * CLUSTER + 4096 + 700])
def test_odd_sizes_stay_as_they_are(storage, size, rng):
    """R4, R13: the last block is shorter than O_DIRECT can write, and neither file may grow to fit it."""
    t0 = rng.randbytes(storage.size(size))
    path = storage.image(t0)
    target = storage.new_path()
    model = bytearray(t0)
    with storage.open(path) as disk, disk.snapshot(target) as snapshot:
        assert disk.size == snapshot.size == len(t0)
        for offset in sorted({0, len(t0) // 2, len(t0) - 1, max(0, len(t0) - 600)}):
            data = rng.randbytes(len(t0) - offset)
            disk.pwrite(data, offset)
            model[offset:] = data
            assert disk.pread(len(t0) - offset, offset) == data
        disk.pwrite_zeroes(len(t0) - 1, 1)
        model[-1] = 0
        disk.discard(len(t0) - 1, 1)
        assert disk.pread(len(t0) - 1, 0) == model[:-1]
        assert snapshot.pread(len(t0), 0) == t0
        model[-1:] = disk.pread(1, len(t0) - 1)
    with open(path, "rb") as f:
        assert f.read() == model
    assert os.stat(target).st_size == len(t0)


def rounds(threads, count, body):
    """Run ``body(thread, round)`` in all threads, each round at once, ``count`` rounds; the first error of any."""
    barrier = threading.Barrier(threads)
    errors = []

    def work(thread):
        try:
            for i in range(count):
                barrier.wait(30)
                body(thread, i)
                barrier.wait(30)
        except BaseException as e:
            errors.append(e)
            barrier.abort()

    started = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive(), "a writer hangs"
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])


@pytest.mark.parametrize("snapshotted", [False, True], ids=["plain", "snapshotted"])
def test_two_unaligned_writes_into_one_block_lose_neither(storage, snapshotted, rng):
    """R13. Each disk is new, so that the first unaligned writes meet the switch to listed writes, too."""
    t0 = rng.randbytes(storage.size(2 * CLUSTER))
    path = storage.image(t0)
    per_disk = 40
    for _ in range(4):
        with open(path, "r+b") as f:
            f.write(t0)
        model = bytearray(t0)
        writes = []
        for i in range(per_disk):
            block = 4096 * (i % 20)
            cut = rng.randrange(1, 4095)
            writes.append(
                [(block + rng.randrange(cut), block + cut), (block + cut, block + rng.randrange(cut + 1, 4097))]
            )
        data = [[rng.randbytes(end - start) for start, end in pair] for pair in writes]
        with storage.open(path) as disk:
            snapshot = disk.snapshot(storage.new_path()) if snapshotted else None
            rounds(2, per_disk, lambda t, i, d=disk, w=writes, b=data: d.pwrite(b[i][t], w[i][t][0]))
            for pair, parts in zip(writes, data, strict=True):
                for (start, end), part in zip(pair, parts, strict=True):
                    model[start:end] = part
            assert disk.pread(disk.size, 0) == model
            if snapshot is not None:
                assert snapshot.pread(snapshot.size, 0) == t0


@pytest.mark.parametrize("whole", ["aligned-memory", "unaligned-memory", "zeroes", "zeroes-unmap"])
def test_a_whole_block_and_a_part_of_it_written_at_once(storage, whole, rng):
    """R13. Either order is right; what the block held before is not, and no torn part is."""
    t0 = b"\xee" * storage.size(2 * CLUSTER)
    path = storage.image(t0)
    for _ in range(4):
        with open(path, "r+b") as f:
            f.write(t0)
        with storage.open(path) as disk:
            blocks = {"aligned-memory": aligned(b"A" * 4096), "unaligned-memory": memoryview(b"-" + b"A" * 4096)[1:]}
            fill = b"A" if whole in blocks else b"\0"
            parts = [(4096 * i + rng.randrange(1, 2000), rng.randrange(1, 2000)) for i in range(20)]

            def write(thread, i, disk=disk, blocks=blocks, parts=parts):
                if thread == 1:
                    disk.pwrite(b"B" * parts[i][1], parts[i][0])
                elif whole in blocks:
                    disk.pwrite(blocks[whole], 4096 * i)
                else:
                    disk.pwrite_zeroes(4096 * i, 4096, may_unmap=whole == "zeroes-unmap")

            rounds(2, len(parts), write)
            for i, (offset, length) in enumerate(parts):
                got = disk.pread(4096, 4096 * i)
                start = offset - 4096 * i
                lower, part, upper = got[:start], got[start : start + length], got[start + length :]
                assert set(lower + upper) == set(fill), "bytes beside the part are the whole block's"
                assert part in (b"B" * length, fill * length)


def test_neighbours_in_one_block_under_a_snapshot_and_its_readers(storage, seed):
    """Guest threads that write single bytes of shared blocks while the snapshot is read: both sides stay exact."""
    rng = random.Random(seed)
    t0 = rng.randbytes(storage.size(3 * CLUSTER + 100))
    disk = storage.disk(t0)
    span, threads = disk.size // 300, 3
    with disk.snapshot(storage.new_path(), cluster_size=4096) as snapshot:

        def work(thread, i):
            if thread == threads:
                assert snapshot.pread(disk.size, 0) == t0
                return
            for k in range(10):
                offset = (i * 10 + k) * span % (disk.size - threads)
                disk.pwrite(bytes([65 + thread]), offset + thread)

        rounds(threads + 1, 8, work)
        assert snapshot.pread(disk.size, 0) == t0
        model = bytearray(t0)
        for i in range(80):
            offset = i * span % (disk.size - threads)
            model[offset : offset + threads] = b"ABC"
        assert disk.pread(disk.size, 0) == model


def test_flush_and_fua_reach_the_disk(storage, rng):
    disk = storage.disk(rng.randbytes(storage.size(CLUSTER)))
    plan = FaultPlan()
    disk._inject(plan)
    disk.pwrite(b"durable", 100, fua=True)
    disk.pwrite_zeroes(5000, 5000, fua=True)
    zeroes_flushed = len(plan.calls("flush"))
    disk.flush()
    assert zeroes_flushed >= 1
    assert len(plan.calls("flush")) == zeroes_flushed + 1
    with open(disk.path, "rb") as f:
        assert f.read()[100:107] == b"durable"
    disk._inject(None)


def test_memory_of_any_alignment(storage, rng):
    """O_DIRECT takes only aligned memory; the guest need not know."""
    t0 = rng.randbytes(storage.size(CLUSTER))
    disk = storage.disk(t0)
    memory = bytearray(8192 + 64)
    for shift in (0, 1, 8, 63):
        view = memoryview(memory)[shift : shift + 8192]
        disk.pread_into(view, 4096)
        assert view == t0[4096 : 4096 + 8192]
        disk.pwrite(view, 3 * 4096)
        assert disk.pread(8192, 3 * 4096) == view
        disk.pwrite(t0[3 * 4096 : 5 * 4096], 3 * 4096)
    with disk.snapshot(storage.new_path()) as snapshot:
        view = memoryview(memory)[3 : 3 + 5000]
        snapshot.pread_into(view, 777)
        assert view == t0[777 : 777 + 5000]


def test_direct_disks_are_direct(storage):
    """Or the matrix proves nothing."""
    disk = storage.disk(bytes(storage.size(CLUSTER)))
    flags = fcntl.fcntl(disk._file.fd, fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) == storage.direct
    assert (disk._file.align > 1) == storage.direct
    if storage.is_device and storage.direct:
        assert disk._file.align == storage.sector
