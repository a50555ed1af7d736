"""Ranks of a score matrix [N captions, V videos] that is read in strips of rows, twice, and need not exist as a whole.

Memory is that of a strip and a few numbers per caption and video, whatever N and V; what comes out does not depend on
how the rows are cut. Text-to-video ranks need one row at a time. Video-to-text ranks need the score of each video's own
captions first: the first reading takes them, with the sums of a softmax over captions, and the second one counts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

LARGEST = 600.0  # values whose exp() is far from the ends of float64, so that a softmax needs no shift


class Scores(Protocol):
    """A matrix [N, V] that can be read row by row, any number of times with the same result."""

    shape: tuple[int, int]
    device: torch.device  # where its strips come to lie

    def strips(self, order: Tensor) -> Iterator[Tensor]:
        """The rows `order` (int64 [n]), in that order, in strips float [at least 1, V] of bounded memory."""


class Held:
    """A matrix in memory, read on `device` in strips of about `pairs` entries."""

    def __init__(self, matrix: Tensor, pairs: int, device: torch.device | None = None) -> None:
        self.matrix = matrix if matrix.is_floating_point() else matrix.double()
        self.shape, self.pairs, self.device = (len(matrix), matrix.shape[1]), pairs, device or matrix.device

    def strips(self, order: Tensor) -> Iterator[Tensor]:
        for rows in order.split(rows_of(self.pairs, self.shape[1])):
            yield self.matrix[as_slice(rows)].to(self.device)


def rows_of(pairs: int, width: int) -> int:
    """How many rows of `width` entries make about `pairs`; one at least."""
    return max(1, pairs // max(width, 1))


def as_slice(rows: Tensor) -> slice | Tensor:
    """Consecutive rows as a slice, which copies nothing."""
    first = int(rows[0])
    return slice(first, first + len(rows)) if torch.equal(rows, torch.arange(first, first + len(rows))) else rows


def tiles(scores: Scores, order: Tensor, pairs: int) -> Iterator[tuple[int, Tensor]]:
    """The strips, cut to about `pairs` entries as a cache holds them: (place in `order`, rows [n, V])."""
    place = 0
    for strip in scores.strips(order):
        for tile in strip.split(rows_of(pairs, scores.shape[1])):
            yield place, tile
            place += len(tile)


class ColumnSoftmax:
    """Softmax over all rows, column by column, in float64: the sums are taken a tile at a time.

    They are kept in two float64 numbers (Knuth's TwoSum), so that neither the order of the rows nor how they are cut
    shows in the result. factor: the values are multiplied with it first. shift [V]: subtracted before exp().
    """

    def __init__(self, scores: Scores, factor: float = 1.0, shift: Tensor | None = None) -> None:
        self.factor, self.shift = factor, shift
        self.high, self.low = torch.zeros(2, scores.shape[1], dtype=torch.double, device=scores.device)

    def add(self, tile: Tensor) -> None:
        self._add(self._exp(tile.double(), slice(None)))

    def _exp(self, values: Tensor, columns: Tensor | slice) -> Tensor:
        values = values if self.factor == 1 else values * self.factor
        return values.exp() if self.shift is None else (values - self.shift[columns]).exp_()

    def _add(self, terms: Tensor) -> None:
        """terms [n, V], pairwise: each half with the other, until one row is left."""
        while len(terms) > 1:
            half = len(terms) // 2
            total, lost = two_sum(terms[:half], terms[half : 2 * half])
            self.low += lost.sum(dim=0)
            if len(terms) % 2:
                self._add(terms[-1:])
            terms = total
        total, lost = two_sum(self.high, terms[0])
        self.high.copy_(total)
        self.low += lost

    def weigh(self, values: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """values [..., len(columns)] of those columns -> values * softmax."""
        return self._exp(values, columns).div_((self.high + self.low)[columns]).mul_(values)

    def logsumexp(self) -> Tensor:
        """Over all rows: [V]."""
        return (self.high + self.low).log() + (0 if self.shift is None else self.shift)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as it rounds, and what the rounding lost, exactly."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def first_reading(
    scores: Scores, order: Tensor, pairs: int, columns: ColumnSoftmax | None = None, views: Sequence["View"] = ()
) -> ColumnSoftmax | None:
    """Show all rows to the `views`; returns `columns` with its sums, for which large values take two readings more.

    Raises ValueError for NaN (naming the first), and with `columns` for infinite values.
    """
    least, most = (torch.tensor(bound, device=scores.device) for bound in (float("inf"), float("-inf")))
    for place, tile in tiles(scores, order, pairs):
        low, high = tile.aminmax()
        least.copy_(torch.minimum(least, low))
        most.copy_(torch.maximum(most, high))
        if columns:
            columns.add(tile)
        for view in views:
            view.observe(place, tile)
    largest = float(torch.maximum(-least, most))
    if math.isnan(largest):
        raise nan_error(scores, pairs)
    if columns is None or columns.factor * largest <= LARGEST:
        return columns
    if math.isinf(largest):
        raise ValueError("similarity holds infinite values, of which no softmax can be taken")
    tops = torch.full_like(columns.high, float("-inf"))
    for _, tile in tiles(scores, order, pairs):
        tops = torch.maximum(tops, tile.amax(dim=0).double())
    columns = ColumnSoftmax(scores, columns.factor, columns.factor * tops)
    for _, tile in tiles(scores, order, pairs):
        columns.add(tile)
    return columns


def nan_error(scores: Scores, pairs: int) -> ValueError:
    """What to say of a matrix that holds NaN."""
    found, first = 0, None
    for place, tile in tiles(scores, torch.arange(scores.shape[0]), pairs):
        if len(places := tile.isnan().nonzero()):
            found += len(places)
            first = first or (place + int(places[0, 0]), int(places[0, 1]))
    return ValueError(f"similarity holds {found} NaN, the first at caption {first[0]}, video {first[1]}")


def row_softmax(tile: Tensor) -> Tensor:
    """values * softmax over each row, in float64."""
    values = tile.double()
    return values.softmax(dim=1).mul_(values)


class Pairs:
    """Correct pairs: places in the order of rows, ascending, and their columns; int64 [P] each."""

    def __init__(self, places: Tensor, columns: Tensor, device: torch.device) -> None:
        order = places.argsort(stable=True)
        self.places, self.columns = places[order], columns[order].to(device)

    def range(self, place: int, tile: Tensor) -> list[int]:
        """Which of the pairs lie in a tile that starts at `place`: from and to."""
        return torch.searchsorted(self.places, torch.tensor([place, place + len(tile)])).tolist()

    def within(self, place: int, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of those inside a tile that starts at `place`."""
        first, last = self.range(place, tile)
        return (self.places[first:last] - place).to(tile.device), self.columns[first:last]


class View:
    """Ranks of a matrix made from the scores in two steps: row by row, then number by number of a column.

    rows: [n, V] -> [n, V]. columns: values and which columns -> values; it is known only after the first reading.
    A rank is the number of wrong candidates that score at least as high as the best correct one. Among captions the
    candidates are groups, those of one video each, that score by their best caption.
    """

    def __init__(self, scores: Scores, owner: Tensor, rows: Callable[[Tensor], Tensor] = lambda tile: tile) -> None:
        self.scores, self.rows, self.owner = scores, rows, owner
        self.columns: Callable[..., Tensor] = lambda values, columns=slice(None): values
        self.order = owner.argsort(stable=True)  # the captions of a video one after the other
        self.group = owner[self.order]
        self.of_texts: Pairs | None = None
        self.of_videos: Pairs | None = None
        # Room for results is made once: small tensors that stay, made between large ones that go, would break up the
        # heap, which then grows with every tile.
        self.own: Tensor | None = None  # scores of the pairs of `of_videos`
        self.counts = torch.zeros(len(owner), dtype=torch.int64, device=scores.device)
        self.video_counts = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
        self.last = -1  # the group that the last tile ended in, and whom it beat
        self.beaten = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)

    def texts(self, also: Mapping[int, Sequence[int]]) -> "View":
        """Count text-to-video ranks; also: caption -> videos that are correct besides its own."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place))
        more = [(int(place[caption]), video) for caption, others in also.items() for video in others]
        self.of_texts = self._pairs(more)
        return self

    def videos(self, also: Mapping[int, Sequence[int]]) -> "View":
        """Count video-to-text ranks; also: video -> videos whose captions are correct besides its own."""
        first = torch.searchsorted(self.group, torch.arange(self.scores.shape[1] + 1)).tolist()
        more = [(place, v) for v, others in also.items() for u in others for place in range(first[u], first[u + 1])]
        self.of_videos = self._pairs(more)
        return self

    def _pairs(self, more: list[tuple[int, int]]) -> Pairs:
        extra = torch.tensor(more, dtype=torch.int64).reshape(-1, 2)
        places = torch.cat([torch.arange(len(self.group)), extra[:, 0]])
        return Pairs(places, torch.cat([self.group, extra[:, 1]]), self.scores.device)

    def observe(self, place: int, tile: Tensor) -> None:
        """First reading."""
        if self.of_videos:
            first, _ = self.of_videos.range(place, tile)
            own = self.rows(tile)[self.of_videos.within(place, tile)]
            if self.own is None:
                self.own = own.new_empty(len(self.of_videos.places))
            self.own[first : first + len(own)] = own

    def prepare(self) -> None:
        """Between the readings, when `columns` is known: the score that the captions of others must reach."""
        if self.of_videos:
            columns = self.of_videos.columns
            own = self.columns(self.own, columns)
            lowest = own.new_full((self.scores.shape[1],), float("-inf"))
            self.needed = lowest.scatter_reduce_(0, columns, own, "amax")

    def count(self, place: int, tile: Tensor) -> None:
        """Second reading."""
        values = self.columns(self.rows(tile))
        if self.of_texts:
            rows, columns = correct = self.of_texts.within(place, tile)
            lowest = values.new_full((len(values),), float("-inf"))
            needed = lowest.scatter_reduce_(0, rows, values[correct], "amax")
            ahead = values >= needed[:, None]
            ahead[correct] = False
            self.counts[place : place + len(tile)] = ahead.sum(dim=1)
        if self.of_videos:
            ahead = values >= self.needed
            ahead[self.of_videos.within(place, tile)] = False
            self._count_groups(self.group[place : place + len(tile)], ahead)

    def _count_groups(self, group: Tensor, ahead: Tensor) -> None:
        """Each group once, however many of its captions are ahead and in however many tiles it lies."""
        groups, index = group.unique_consecutive(return_inverse=True)
        if len(groups) < len(group):
            captions = torch.zeros(len(groups), ahead.shape[1], dtype=torch.int32, device=ahead.device)
            ahead = captions.index_add_(0, index.to(ahead.device), ahead.int()) > 0
        if self.last == int(group[0]):
            ahead[0] |= self.beaten
            self.video_counts -= self.beaten.long()
        self.video_counts += ahead.sum(dim=0)
        self.last = int(group[-1])
        self.beaten.copy_(ahead[-1])

    def ranks(self) -> dict[str, Tensor]:
        """What was asked for, of "t2v" [N] and "v2t" [V]: int64 on the CPU."""
        found = {}
        if self.of_texts:
            found["t2v"] = torch.empty_like(self.order)
            found["t2v"][self.order] = self.counts.cpu()
        return found | ({"v2t": self.video_counts.cpu()} if self.of_videos else {})
