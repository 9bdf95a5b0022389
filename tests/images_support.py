"""What the tests of backup images share: writing a backup piece by piece, and what qemu-img says of it."""

import json
import random
import subprocess
import time
import uuid

from programs_support import need

from cbwcore._cbwcore import zero_units
from cbwcore.images.manifest import BackupFacts, BitmapUse, Source, iso_time
from cbwcore.images.output import open_output

UNIT = 65536


def qemu_img(*arguments, status=0, timeout=60):
    """The output of qemu-img, which must end with that status."""
    need("qemu-img")
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_image(path):
    """qemu-img finds no error and no leak."""
    found = json.loads(qemu_img("check", "--output=json", path))
    assert found.get("corruptions", 0) == found.get("leaks", 0) == found["check-errors"] == 0, found
    return found


def qemu_content(path, raw, size):
    """The bytes of an image, as qemu-img converts it; what it adds up to whole sectors must be zeroes."""
    qemu_img("convert", "-O", "raw", path, raw)
    with open(raw, "rb") as f:
        content = f.read()
    assert len(content) == -(-size // 512) * 512
    assert not any(content[size:])
    return content[:size]


def facts(sync="full", *, bitmap=None, since=None, backup_id=None):
    """What a job knows of a backup."""
    use = None if bitmap is None else BitmapUse(name=bitmap, since=since, granularity=UNIT)
    return BackupFacts(
        id=backup_id or uuid.uuid4().hex,
        created=iso_time(time.time()),
        source=Source(path="/vm/disk.img", identity="a disk"),
        sync=sync,
        bitmap=use,
    )


def layout(rng, size, *, data=0.5):
    """Content of ``size`` bytes in clusters that are random, compressible or zero."""
    content = bytearray(size)
    for start in range(0, size, UNIT):
        length = min(UNIT, size - start)
        if rng.random() < data:
            random_part = length if rng.random() < 0.5 else length // 4
            content[start : start + random_part] = rng.randbytes(random_part)
            content[start] |= 1
    return bytes(content)


def changed(rng, content, share=0.3):
    """Another content, and the indices of the clusters that were written, some of them with the bytes that they had."""
    new = bytearray(content)
    dirty = []
    for index in range(-(-len(content) // UNIT)):
        if rng.random() < share:
            dirty.append(index)
            start, length = index * UNIT, min(UNIT, len(content) - index * UNIT)
            kind = rng.randrange(4)
            if kind < 3:
                new[start : start + length] = [bytes(length), rng.randbytes(length), b"text" * (length // 4 + 1)][kind][
                    :length
                ]
    return bytes(new), dirty


def pieces_of(size, dirty=None, longest=16):
    """(offset, length) of pieces of at most ``longest`` clusters that cover all of the disk, or the dirty clusters."""
    indices = range(-(-size // UNIT)) if dirty is None else dirty
    first = before = None
    for index in indices:
        if first is not None and index == before + 1 and index - first < longest:
            before = index
            continue
        if first is not None:
            yield first * UNIT, min((before + 1) * UNIT, size) - first * UNIT
        first = before = index
    if first is not None:
        yield first * UNIT, min((before + 1) * UNIT, size) - first * UNIT


def store(output, content, dirty=None, *, rng=None, longest=16):
    """Write the pieces of a disk with ``content``; where ``rng``, a few at a time in any order."""
    view = memoryview(content)
    waiting = []
    for offset, length in pieces_of(len(content), dirty, longest):
        waiting.append(output.begin(offset, length))
        if rng is None or len(waiting) > rng.randrange(8):
            store_some(output, view, waiting, rng)
    store_some(output, view, waiting, rng)


def store_some(output, view, waiting, rng):
    if rng is not None:
        rng.shuffle(waiting)
    for piece in waiting:
        part = view[piece.offset : piece.offset + piece.length]
        zeroes = zero_units(part, UNIT)
        if 0 in zeroes or (rng is not None and rng.random() < 0.5):
            output.write(piece, part, zeroes)
        else:
            output.write_zeroes(piece)
    waiting.clear()


def backup(path, content, *, format="qcow2", sync=None, dirty=None, backing=None, rng=None, longest=16, **options):
    """A finished backup of ``content``, or of its ``dirty`` clusters on ``backing``; its manifest."""
    sync = sync or ("full" if dirty is None else "incremental")
    given = {key: options.pop(key) for key in ("bitmap", "since", "backup_id") if key in options}
    output = open_output(path, size=len(content), format=format, backing=backing, layered=sync != "full", **options)
    with output:
        store(output, content, dirty, rng=rng, longest=longest)
        return output.finish(facts(sync, **given))


def seeded(seed=1):
    return random.Random(seed)
