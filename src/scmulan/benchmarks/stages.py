"""What each stage of a job takes, by timing the functions that the job calls."""

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from scmulan.language.storage import read_rows
from scmulan.model.transformer import Mulan


class Stages:
    """Seconds by stage while the context is open: reading, tokenising, the model, writing; the rest is glue."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "tokenising", "model", "writing"), 0.0)
        self._patches = ExitStack()

    def __enter__(self) -> "Stages":
        from scmulan.tl import on_disk, reading

        for where, name, stage in (
            ("scmulan.language.storage.read_rows", read_rows, "reading"),
            ("scmulan.tl.on_disk.open_input", on_disk.open_input, "reading"),
            ("scmulan.tl.reading.choose_matrix", reading.choose_matrix, "reading"),
            ("scmulan.tl.reading.tokenize", reading.tokenize, "tokenising"),
            ("scmulan.tl.reading.match_genes", reading.match_genes, "tokenising"),
            ("scmulan.tl.on_disk.copy_with_results", on_disk.copy_with_results, "writing"),
        ):
            self._patches.enter_context(patch(where, self._timed(name, stage)))
        for method in ("last", "forward", "entity_logits"):
            self._patches.enter_context(patch.object(Mulan, method, self._timed(getattr(Mulan, method), "model")))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def shares(self, total: float) -> dict[str, float]:
        """Share of each stage in so many seconds; ``other`` is what none of them took."""
        found = {stage: round(seconds / total, 3) for stage, seconds in self.seconds.items()}
        return {**found, "other": round(1 - sum(found.values()), 3)}

    def _timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        return timed
