"""The handshake of the NBD protocol: constants under their names in the specification (NBD doc/proto.md), and layouts.

All numbers on the wire are big-endian. The transmission phase is the compiled core's.
"""

from __future__ import annotations

import struct
from typing import Final

NBD_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
NBD_OPTS_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC: Final = 0x0003E889045565A9

# Handshake flags, and the client's, which are the same bits.
NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

# Transmission flags.
NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_ERR_UNSUP: Final = (1 << 31) + 1
NBD_REP_ERR_POLICY: Final = (1 << 31) + 2
NBD_REP_ERR_INVALID: Final = (1 << 31) + 3
NBD_REP_ERR_TLS_REQD: Final = (1 << 31) + 5
NBD_REP_ERR_UNKNOWN: Final = (1 << 31) + 6
NBD_REP_ERR_TOO_BIG: Final = (1 << 31) + 9

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_MAX_STRING: Final = 4096  # bytes; no string may be longer
NBD_SHOULD_STRING: Final = 256  # and this is what it should keep to

BASE_ALLOCATION: Final = "base:allocation"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

GREETING: Final = struct.Struct(">QQH")  # NBD_MAGIC, NBD_OPTS_MAGIC, handshake flags
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")  # NBD_OPTS_MAGIC, option, length of its payload
OPTION_REPLY: Final = struct.Struct(">QIII")  # NBD_REP_MAGIC, option, reply type, length of its payload
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags
EXPORT_NAME_ZEROES: Final = bytes(124)  # what follows them without NBD_FLAG_C_NO_ZEROES
INFO_TYPE: Final = struct.Struct(">H")
INFO_EXPORT: Final = struct.Struct(">HQH")  # NBD_INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")  # NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
