"""Cells placed, beside the release's way (which decodes three words to get there): see :mod:`.annotate`."""

from pathlib import Path
from typing import Any

from scmulan.benchmarks import annotate


def run(*, quick: bool = False, data: Path | None = None) -> dict[str, Any]:
    """Time embedding; parameters and result as for :func:`scmulan.benchmarks.annotate.run`."""
    return annotate.run(quick=quick, data=data, verb="embed")
