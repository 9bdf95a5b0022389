"""What mypy must infer of the public surface; CI runs `mypy tests/typing/reveal.py`."""

from collections.abc import Iterator
from typing import assert_type

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

import cbwcore
from cbwcore.reader import SnapshotFile

disk = cbwcore.Disk("disk.img", direct=True, io="psync")
assert_type(disk.pread(1, 0), bytes)
assert_type(disk.size, int)
assert_type(disk.snapshots, tuple[cbwcore.Snapshot, ...])
assert_type(disk.block_status(), Iterator[cbwcore.Extent])
assert_type(disk.stats(), cbwcore.DiskStats)
assert_type(disk.bitmaps["daily"], cbwcore.DirtyBitmap)

with disk.snapshot("fleece.img", on_cbw_error="break-snapshot", cbw_timeout=45) as snapshot:
    assert_type(snapshot, cbwcore.Snapshot)
    assert_type(snapshot.pread(1, 0), bytes)
    assert_type(snapshot.open(), SnapshotFile)
    assert_type(snapshot.state, cbwcore.SnapshotState)
    assert_type(snapshot.error, cbwcore.CopyBeforeWriteError | None)
    assert_type(snapshot.stats(), cbwcore.SnapshotStats)

assert_type(cbwcore.snapshot_group([(disk, None)]), list[cbwcore.Snapshot])
assert_type(cbwcore.SnapshotOptions.from_qapi({}), cbwcore.SnapshotOptions)

bitmap = cbwcore.DirtyBitmap(1 << 20)
assert_type(bitmap.numpy(), NDArray[np.uint8])
assert_type(bitmap.bitarray(), bitarray)
assert_type(bitmap.ranges(), Iterator[tuple[int, int]])

restored = cbwcore.restore("mon.qcow2", "new.img", verify=True, progress=lambda label, done, total: None)
assert_type(restored.size, int)
assert_type(restored.verified, bool)
assert_type(cbwcore.verify_backup("mon.qcow2").complete, bool)
