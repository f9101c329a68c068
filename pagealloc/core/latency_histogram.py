"""One latency distribution as Python sees it: counts by log-linear bucket.

An octave, from 16 * 2**k ns up to twice that, has eight buckets of equal width.  They reach from
16 ns to 100,663,296 ns; one more counts what is shorter, one what is longer.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar

__all__ = ["LatencyHistogram", "size_group_labels"]

_BUCKETS_PER_OCTAVE = 8
_FIRST_NS = 16
_OVERFLOW_NS = 3 << 25
_LAST_FACTOR_TWO_NS = 1 << 26
_LARGEST_RUN_BYTES = 1 << 30

_FACTOR_TWO_EDGES_NS = tuple(
    _FIRST_NS << k for k in range((_LAST_FACTOR_TWO_NS // _FIRST_NS).bit_length())
)
_BUCKET_EDGES_NS = tuple(
    edge_ns
    for octave_ns in _FACTOR_TWO_EDGES_NS
    for i in range(_BUCKETS_PER_OCTAVE)
    if (edge_ns := octave_ns + i * octave_ns // _BUCKETS_PER_OCTAVE) <= _OVERFLOW_NS
)


@dataclass(frozen=True, slots=True)
class LatencyHistogram:
    """How long the sampled allocations of one size group took on one NUMA node.

    Bucket 0 counts samples below ``bucket_edges_ns[0]``, bucket ``i`` those with
    ``bucket_edges_ns[i - 1] <= ns < bucket_edges_ns[i]``, the last one those from
    ``bucket_edges_ns[-1]`` on.  No bucket between the two edges is wider than an eighth of its
    lower edge.

    Parameters
    ----------
    size_class : str
        Slot size or, for page runs, the largest size of the group, such as ``"64 B"`` or
        ``"64 KiB"``; ``"all"`` after several were merged.
    numa_node : int or None
        Node the thread ran on; None after several were merged.
    sum_ns : int
        Sum of all samples, in nanoseconds.  Read while threads record, it may lack the samples of
        that moment, or be ahead by them.
    counts : tuple of int, shape (len(bucket_edges_ns) + 1,)
        Samples by bucket.

    Attributes
    ----------
    n_samples : int
        Sum of `counts`.  Samples, not allocations: the allocator times one in many.
    bucket_edges_ns : tuple of int, shape (181,)
        16, 18, ... 100,663,296 ns; the same for every histogram.
    factor_two_edges_ns : tuple of int, shape (23,)
        16, 32, ... 67,108,864 ns, all of them among `bucket_edges_ns`.

    Raises
    ------
    ValueError
        `counts` has another length than there are buckets.

    Notes
    -----
    Immutable, so free to share between threads.
    """

    size_class: str
    numa_node: int | None
    sum_ns: int
    counts: tuple[int, ...]
    n_samples: int = field(init=False)

    bucket_edges_ns: ClassVar[tuple[int, ...]] = _BUCKET_EDGES_NS
    factor_two_edges_ns: ClassVar[tuple[int, ...]] = _FACTOR_TWO_EDGES_NS

    def __post_init__(self) -> None:
        if len(self.counts) != len(_BUCKET_EDGES_NS) + 1:
            raise ValueError(
                f"{len(self.counts)} counts: a LatencyHistogram has "
                f"{len(_BUCKET_EDGES_NS) + 1} buckets"
            )
        object.__setattr__(self, "n_samples", sum(self.counts))

    @classmethod
    def total(cls, histograms: Iterable["LatencyHistogram"]) -> "LatencyHistogram":
        """Return the samples of all `histograms` in one.

        It keeps the size class and the node that all of them share; where they differ, or there
        is no histogram, these are ``"all"`` and None.
        """
        found = list(histograms)
        size_classes = {one.size_class for one in found}
        nodes = {one.numa_node for one in found}
        return cls(
            size_class=size_classes.pop() if len(size_classes) == 1 else "all",
            numa_node=nodes.pop() if len(nodes) == 1 else None,
            sum_ns=sum(one.sum_ns for one in found),
            counts=tuple(
                sum(one.counts[i] for one in found) for i in range(len(_BUCKET_EDGES_NS) + 1)
            ),
        )

    def merge(self, other: "LatencyHistogram") -> "LatencyHistogram":
        """Return the samples of both in one; see `total` for its size class and node."""
        return self.total((self, other))

    @property
    def mean_ns(self) -> float:
        """Mean of all samples, exact; NaN without any."""
        return self.sum_ns / self.n_samples if self.n_samples else math.nan

    def percentile_ns(self, q: float) -> float:
        """Return the duration that `q` percent of the samples do not exceed.

        That is the smallest sample that at least ``q / 100 * n_samples`` samples do not exceed
        (`numpy.percentile` with ``method="inverted_cdf"``), interpolated within its bucket.

        Parameters
        ----------
        q : float
            0 to 100.

        Returns
        -------
        float
            Nanoseconds, off by less than 12.5 % of the sample itself.  Below 16 ns it is off by
            less than 16 ns; from 100,663,296 ns on it is that edge, a lower bound.  NaN without
            samples.

        Raises
        ------
        ValueError
            `q` is not between 0 and 100.
        """
        if not 0 <= q <= 100:  # also catches NaN
            raise ValueError(f"q={q!r} is no percentage: 0 to 100 are possible")
        if not self.n_samples:
            return math.nan
        rank = min(max(math.ceil(q * self.n_samples / 100), 1), self.n_samples)
        cumulative = list(accumulate(self.counts))
        bucket = bisect_left(cumulative, rank)
        if bucket == len(_BUCKET_EDGES_NS):
            return float(_BUCKET_EDGES_NS[-1])
        lower_ns = _BUCKET_EDGES_NS[bucket - 1] if bucket else 0
        width_ns = _BUCKET_EDGES_NS[bucket] - lower_ns
        # The samples of a bucket are taken to lie evenly, each in the middle of its share.
        place = rank - cumulative[bucket] + self.counts[bucket] - 0.5
        return lower_ns + width_ns * place / self.counts[bucket]

    def factor_two_counts(self) -> tuple[int, ...]:
        """Return the counts of the buckets between `factor_two_edges_ns`.

        Returns
        -------
        tuple of int, shape (len(factor_two_edges_ns) + 1,)
            The first counts samples below 16 ns, the last those from 67,108,864 ns on.  Plain
            counts: Prometheus wants them cumulative (`itertools.accumulate`).  They are exact, as
            no bucket lies across an edge; a sample on an edge counts above it.
        """
        n_octaves = len(_FACTOR_TWO_EDGES_NS) - 1
        starts = [1 + i * _BUCKETS_PER_OCTAVE for i in range(n_octaves + 1)]
        ends = [*starts[1:], len(self.counts)]
        return (
            self.counts[0],
            *(sum(self.counts[start:end]) for start, end in zip(starts, ends, strict=True)),
        )


def _size_label(nbytes: int) -> str:
    """Exact, unlike `format_bytes`: two size classes never share a label."""
    for unit_bytes, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes % unit_bytes == 0:
            return f"{nbytes // unit_bytes} {unit}"
    return f"{nbytes} B"


def size_group_labels(slot_sizes_bytes: Sequence[int], page_bytes: int) -> list[str]:
    """Return the names of all size groups, in the order the core numbers them.

    Parameters
    ----------
    slot_sizes_bytes : sequence of int
        Slot sizes of the size classes, in bytes: a group each.
    page_bytes : int
        Page size in bytes, a power of two.  Page runs follow the size classes, grouped by the
        power of two that holds their bytes, from one page to 1 GiB, and one group above.

    Returns
    -------
    list of str
        Such as ``"64 B"``, ``"4 KiB"``, ``"1 GiB"``, ``"> 1 GiB"``.
    """
    labels = [_size_label(nbytes) for nbytes in slot_sizes_bytes]
    run_bytes = page_bytes
    while run_bytes <= _LARGEST_RUN_BYTES:
        labels.append(_size_label(run_bytes))
        run_bytes *= 2
    labels.append("> " + _size_label(_LARGEST_RUN_BYTES))
    return labels
