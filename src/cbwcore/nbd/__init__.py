"""The NBD server: disks and snapshots for NBD clients."""

from cbwcore.nbd.limits import NbdLimits
from cbwcore.nbd.server import NbdServer
from cbwcore.nbd.tls import TlsConfig

__all__ = ["NbdLimits", "NbdServer", "TlsConfig"]
