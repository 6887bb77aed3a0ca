"""Loaded by Python at the start of every program of the fleet: a wall clock that can be moved.

`FEDGE_CHAOS_CLOCK` names a file of eight bytes, the seconds (a float64) by which this program's
wall clock is wrong now; the kit writes it while the program runs. Only `time.time` and
`time.time_ns` are moved: the monotonic clock of a computer does not jump.
"""

import mmap
import os
import struct
import time

_path = os.environ.get("FEDGE_CHAOS_CLOCK")
if _path:
    with open(_path, "r+b") as _file:  # noqa: PTH123 -- before anything is imported
        _shift = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)
    _right_time, _right_time_ns = time.time, time.time_ns

    def _time() -> float:
        return _right_time() + struct.unpack_from("<d", _shift)[0]

    def _time_ns() -> int:
        return _right_time_ns() + int(struct.unpack_from("<d", _shift)[0] * 1e9)

    time.time, time.time_ns = _time, _time_ns
