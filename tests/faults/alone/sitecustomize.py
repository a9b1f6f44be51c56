"""Takes every network from a process, loopback too, as in a container that was given none. Needs root."""

import ctypes
import os

NEW_NETWORK = 0x40000000

if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK) != 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
