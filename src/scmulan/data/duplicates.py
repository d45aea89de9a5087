"""Cells that occur twice, found by the hash of their words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scmulan.data.shards import open_arrays

# Cells of fewer words may agree by chance.
FEWEST_WORDS = 20
# Hashes compared at a time; more cells are compared in several passes, each over a share of the hashes.
HELD = 8_000_000


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which cells repeat an earlier one.

    Parameters
    ----------
    later
        Bool, one per cell of all shards: whether an earlier cell has the same words.
    pairs
        Studies of the first cell and of the one that repeats it, to the number of such cells.
    """

    later: np.ndarray
    pairs: Counter[tuple[int, int]]

    def report(self, studies: Sequence[str]) -> dict[str, Any]:
        """Numbers for the manifest: all, across studies, within studies, and by pair of studies."""
        across = sum(n for (a, b), n in self.pairs.items() if a != b)
        order = sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))
        return {
            "cells": int(self.later.sum()),
            "across_studies": across,
            "within_studies": int(self.later.sum()) - across,
            "pairs": [{"studies": [studies[a], studies[b]], "cells": n} for (a, b), n in order],
        }


def find_repeats(folder: Path, shards: Sequence[dict[str, Any]], held: int = HELD) -> Repeats:
    """Compare all cells of a corpus, at most some ``held`` at a time (and one byte for every cell).

    Parameters
    ----------
    folder
        Of the corpus.
    shards
        Record of each shard, in order.
    held
        Hashes to hold at a time.
    """
    cells = sum(shard["cells"] for shard in shards)
    later = np.zeros(cells, dtype=bool)
    pairs: Counter[tuple[int, int]] = Counter()
    ends = np.cumsum([shard["cells"] for shard in shards])
    study_of_shard = np.array([shard["study"] for shard in shards], dtype=np.int64)
    passes = max(-(-cells // held), 1)
    for part in range(passes):
        hashes, places = [], []
        first = 0
        for shard in shards:
            arrays = open_arrays(folder / shard["file"])[0]
            enough = np.diff(arrays["indptr"]) >= FEWEST_WORDS
            mine = np.flatnonzero(enough & (arrays["content"] % np.uint64(passes) == part))
            hashes.append(arrays["content"][mine])
            places.append(mine + first)
            first += shard["cells"]
        content, place = np.concatenate(hashes), np.concatenate(places)
        order = np.argsort(content, kind="stable")  # within equal hashes, cells keep their order
        content, place = content[order], place[order]
        again = np.flatnonzero(np.r_[False, content[1:] == content[:-1]])
        later[place[again]] = True
        original = place[np.searchsorted(content, content[again], side="left")]
        one, two = (study_of_shard[np.searchsorted(ends, x, side="right")] for x in (original, place[again]))
        pairs.update(zip(one.tolist(), two.tolist(), strict=True))
    return Repeats(later, pairs)
