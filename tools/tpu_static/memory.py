"""The memory of a kernel: copies under way, and the image of an array in scalar memory."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from tools.tpu_static.unknown import U


class Dma:
    """HBM as one channel shared equally by the copies under way; each copy also
    takes a fixed latency.  Copies that do not touch HBM take the latency only."""

    def __init__(self, bytes_per_cycle: float, latency: float, granule: int = 32):
        self.bpc, self.lat, self.granule = bytes_per_cycle, latency, granule
        self.now = 0.0
        self.active = []  # [bytes left, record]; record = [granules, end or None]
        self.flags = collections.defaultdict(collections.deque)
        self.n = collections.Counter()
        self.bytes = collections.Counter()
        self.stall = 0.0

    def _advance(self, t, until=None):
        """Drain the channel to time t, or until the given record has ended."""
        while self.active and (self.now < t or until is not None):
            if until is not None and until[1] is not None:
                return
            k = len(self.active)
            least = min(a[0] for a in self.active)
            dt = least * k / self.bpc
            if until is None and self.now + dt > t:
                d = (t - self.now) * self.bpc / k
                for a in self.active:
                    a[0] -= d
                self.now = t
                return
            self.now += dt
            rest = []
            for a in self.active:
                a[0] -= least
                if a[0] <= 1e-6:
                    a[1][1] = self.now + self.lat
                else:
                    rest.append(a)
            self.active = rest
        if until is None and self.now < t:
            self.now = t

    def start(self, t: float, kind: str, granules: Any, flag: Any) -> None:
        """A copy of a kind such as `hbm_to_vmem` starts at cycle t; `flag` tells of its end."""
        if granules is U:
            granules = 0
        b = granules * self.granule
        self.n[kind] += 1
        self.bytes[kind] += b
        rec = [granules, t + self.lat]
        if "hbm" in kind and b:
            self._advance(t)
            rec[1] = None
            self.active.append([b, rec])
        self.flags[flag if flag is not U else "?"].append(rec)

    def wait(self, t: float, flag: Any, granules: Any) -> float:
        """The cycles from t until so many granules have arrived under this flag."""
        q = self.flags.get(flag if flag is not U else "?")
        if not q:
            return 0.0
        self._advance(t)
        need = granules if granules is not U else 1 << 60
        done = t
        while q and need > 0:
            r = q[0]
            if r[1] is None:
                self._advance(self.now, r)
            done = max(done, r[1])
            if r[0] <= need:
                need -= r[0]
                q.popleft()
            else:
                r[0] -= need
                need = 0
        s = done - t
        self.stall += s
        return s


def smem_words(arr: Any) -> list[int]:
    """SMEM image of an integer operand, as 32-bit words.  One-dimensional 32-bit
    arrays are linear; others are cut into (8,128) tiles (fewer rows if the array
    has fewer), types under 32 bits packing consecutive rows into a word, lowest
    row in the lowest bits.  One-dimensional arrays of such types are read as rows
    of 128.  (Read off the address arithmetic of test kernels.)"""
    a = np.asarray(arr)
    if a.dtype == bool:
        a = a.astype(np.int32)
    bits = a.dtype.itemsize * 8
    if bits > 32:
        a, bits = a.astype(np.int32), 32
    pack = 32 // bits
    if a.ndim <= 1:
        if pack == 1:
            return [int(x) for x in a.reshape(-1)]
        a = a.reshape(-1)  # runs of 128 elements, `pack` of them to a row of words
        a = np.pad(a, (0, -a.size % (128 * pack))).reshape(-1, 128)
    r, c = a.shape[-2:]
    tr = 8
    while tr // 2 >= max(r, pack):
        tr //= 2
    a = a.reshape((-1, r, c)).astype(np.int64) & ((1 << bits) - 1)
    a = np.pad(a, ((0, 0), (0, -r % tr), (0, -c % 128)))
    n, r, c = a.shape
    a = a.reshape(n, r // tr, tr // pack, pack, c // 128, 128)
    w = sum(a[:, :, :, q] << (bits * q) for q in range(pack))  # n, R, tr/pack, C, 128
    w = np.transpose(w, (0, 1, 3, 2, 4)).reshape(-1)
    w = np.where(w >= 1 << 31, w - (1 << 32), w)
    return [int(x) for x in w]
