"""Which of a device's rows are never trained on, so that versions can be measured on them.

A row's place alone decides, so rows that are added later move none to the other side. The places
that are held out are spread evenly: multiples of the golden ratio fall nearly evenly into 0 to 1
(Knuth, The Art of Computer Programming, volume 3, section 6.4), so also a file that is sorted by
label gives some of each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio, odd."""


def held_out(rows: int, share: float) -> npt.NDArray[np.bool_]:
    """For each of `rows` whether it is held out, about `share` of them, 0 to below 1.

    bool `[rows]`.
    """
    places = np.arange(1, rows + 1, dtype=np.uint64) * _GOLDEN
    return places < np.uint64(int(share * 2.0**64))
