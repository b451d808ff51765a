"""The two clocks of a recording: the stamps inside messages and the times at which they were written down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BIN_NS = 1_000_000_000


class ClockOffset:
    """Bag time minus header time over a recording: the median of every second, straight lines between.

    Messages without a header have only a time of recording; this is how they find their place among stamps when the
    two clocks differ or drift (a simulator slower than real time).
    """

    def __init__(self, streams: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """streams: (bag times, header stamps; 0 for none), int64 each; the one with most stamps counts. Give those that
        are written down soonest after their stamps: what they take counts as the clocks' difference."""
        self.knots, self.offsets = np.zeros(1, np.int64), np.zeros(1, np.int64)
        stamped = [(bag[header != 0], header[header != 0]) for bag, header in streams]
        bag_ns, header_ns = max(stamped, key=lambda pair: len(pair[0]), default=(self.knots[:0], self.knots[:0]))
        if not len(bag_ns):
            return
        bins = (bag_ns - bag_ns.min()) // BIN_NS
        places = [np.flatnonzero(bins == b) for b in np.unique(bins)]
        self.knots = np.array([int(np.median(bag_ns[at] - bag_ns[0])) for at in places], np.int64) + bag_ns[0]
        delay = bag_ns - header_ns
        self.offsets = np.array([int(np.median(delay[at] - delay[0])) for at in places], np.int64) + delay[0]

    def at(self, bag_ns: np.ndarray) -> np.ndarray:
        """Offset in ns, int64, at times of recording."""
        return np.interp(bag_ns - self.knots[0], self.knots - self.knots[0], self.offsets - self.offsets[0]).astype(
            np.int64
        ) + int(self.offsets[0])
