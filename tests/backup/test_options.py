"""Options that mean nothing, or not together, are refused with the rule named."""

import pytest

from cbwcore import BackupOptions, BitmapMode, Sync
from cbwcore.errors import ConfigError

GOOD_INCREMENTAL = {"sync": "incremental", "bitmap": "b", "backing": "full.qcow2"}
REFUSED = [
    ("image", {"sync": "most"}, "sync 'most' is not one of full, incremental, bitmap, none"),
    ("image", {"bitmap_mode": "sometimes", "bitmap": "b"}, "bitmap_mode 'sometimes' is not one of"),
    ("image", {"on_source_error": "auto"}, "on_source_error 'auto' is not one of report, ignore, enospc, stop"),
    ("image", {"on_target_error": ""}, "on_target_error '' is not one of"),
    ("image", {"on_cbw_error": "x"}, "on_cbw_error 'x' is not one of"),
    ("image", {"cbw_timeout": -1}, "cbw_timeout -1 is not a number of seconds"),
    ("image", {"format": "vmdk"}, "format 'vmdk' is neither raw nor qcow2"),
    ("image.qcow2", {"compress": "gzip"}, "compress 'gzip' is not zstd"),
    ("image", {"compress": "zstd"}, "compress zstd needs format qcow2, not raw"),
    ("image", {"speed": -1}, "speed -1 is outside 0.."),
    ("image", {"speed": 1.5}, "speed 1.5 is outside"),
    ("image", {"workers": 0}, "workers 0 is outside 1..64"),
    ("image", {"workers": 65}, "workers 65 is outside 1..64"),
    ("image", {"chunk_size": 4096}, "chunk_size 4096 is outside 65536.."),
    ("image", {"chunk_size": 100_000}, "chunk_size 100000 is no multiple of 65536"),
    ("image", {"cluster_size": 5000}, "cluster_size 5000 is no power of two"),
    (None, {}, "sync full needs a target"),
    ("image", {"bitmap_mode": "always"}, "bitmap_mode always needs a bitmap"),
    ("image", {"bitmap": "b", "bitmap_mode": "never"}, "bitmap_mode never has no effect with sync full"),
    ("image", {"backing": "other"}, "backing has no effect with sync full"),
    ("image", {"fallback": "full"}, "fallback has no effect with sync full"),
    ("image.qcow2", {"sync": "incremental", "backing": "f"}, "sync incremental needs a bitmap"),
    (
        "image.qcow2",
        {**GOOD_INCREMENTAL, "bitmap_mode": "never"},
        "incremental has bitmap_mode on-success, not never",
    ),
    ("image.qcow2", {**GOOD_INCREMENTAL, "sync": "bitmap"}, "sync bitmap needs a bitmap_mode"),
    ("image.qcow2", {**GOOD_INCREMENTAL, "backing": None}, "sync incremental needs backing"),
    ("image.qcow2", {**GOOD_INCREMENTAL, "fallback": "none"}, "fallback 'none' is not full"),
    ("image.qcow2", {**GOOD_INCREMENTAL, "cluster_size": 4096}, "needs a cluster_size of 65536 or more, not 4096"),
    ("image", GOOD_INCREMENTAL, "sync incremental needs format qcow2, which can have a backing file, not raw"),
    (None, {"sync": "none", "format": "raw"}, "format has no effect with sync none"),
    (None, {"sync": "none", "fleece": "f"}, "fleece has no effect with sync none"),
    (None, {"sync": "none", "verify": True}, "verify has no effect with sync none"),
    (None, {"sync": "none", "overwrite": True}, "overwrite has no effect with sync none"),
    (None, {"sync": "none", "bitmap": "b", "bitmap_mode": "always"}, "bitmap_mode always has no effect with sync none"),
]


@pytest.mark.parametrize(("target", "options", "why"), REFUSED, ids=[why[:40] for _, _, why in REFUSED])
def test_refused(target, options, why):
    with pytest.raises(ConfigError) as e:
        BackupOptions.make(target, **options)
    assert why in str(e.value)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("image", {}),
        ("image", {"bitmap": "b"}),
        ("image", {"bitmap": "b", "bitmap_mode": "always"}),
        ("image.qcow2", {"compress": "zstd"}),
        ("image", {"format": "qcow2", "compress": "zstd"}),
        ("image.qcow2", GOOD_INCREMENTAL),
        ("image.qcow2", {**GOOD_INCREMENTAL, "bitmap_mode": "on-success", "fallback": "full"}),
        ("image.qcow2", {**GOOD_INCREMENTAL, "sync": "bitmap", "bitmap_mode": "never"}),
        (None, {"sync": "none"}),
        ("fleece", {"sync": "none", "bitmap": "b", "bitmap_mode": "never"}),
    ],
)
def test_accepted(target, options):
    made = BackupOptions.make(target, **options)
    assert made.mode == (made.bitmap_mode or BitmapMode.ON_SUCCESS)
    assert made.layered == (made.sync in (Sync.INCREMENTAL, Sync.BITMAP))


def test_the_format_is_that_of_the_name():
    assert BackupOptions(target="a.qcow2").image_format == "qcow2"
    assert BackupOptions(target=b"a.qcow2").image_format == "qcow2"
    assert BackupOptions(target="a.qcow2", format="raw").image_format == "raw"
    assert BackupOptions(target="a.img").image_format == "raw"


def test_a_word_that_is_no_option():
    with pytest.raises(TypeError, match="nexpected keyword"):
        BackupOptions.make("image", sinc="full")
