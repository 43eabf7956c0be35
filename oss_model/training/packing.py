"""Rows of one length from documents of many: several in a row, each seeing itself alone, and none cut that fits."""

import bisect
from collections.abc import Sequence

import numpy as np

from oss_model.training.chat import Document
from oss_model.training.steps import Batch


def pack(documents: Sequence[Document], length: int) -> Batch:
    """The rows; documents that are longer are cut to `length`.

    Best fit, the longest first: a document goes where it leaves the least room, or begins a row.
    """
    order = sorted(range(len(documents)), key=lambda n: -len(documents[n].tokens))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: (tokens left, row)
    for n in order:
        size = min(len(documents[n].tokens), length)
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        bisect.insort(room, (left - size, row))
    shape = len(rows), length
    packed = Batch(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32))
    for row, members in enumerate(rows):
        at = 0
        for segment, n in enumerate(members, 1):
            tokens, counted = documents[n].tokens[:length], documents[n].counted[:length]
            place = slice(at, at + len(tokens))
            packed.tokens[row, place], packed.counted[row, place], packed.segment_ids[row, place] = tokens, counted, segment
            at += len(tokens)
    return packed


def epoch_rows(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """int64 [batch]: which rows step 1, 2, … takes. Every epoch takes all of them once, in an order of its own.

    A function of the step alone, so that a run that is taken up sees what it would have seen.
    """
    numbers = np.arange((step - 1) * batch, step * batch)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(numbers // count).tolist()}
    return np.array([orders[number // count][number % count] for number in numbers.tolist()])
