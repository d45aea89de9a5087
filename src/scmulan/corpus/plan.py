"""Which tasks a build consists of: to look at each file, to add up its genes, to write its cells."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from scmulan.corpus.spec import CorpusSpec
from scmulan.corpus.survey import Measure, Survey, Write


def surveys(spec: CorpusSpec, work: Path) -> list[Survey]:
    """Tasks that look at each file."""
    return [
        Survey(record=work / "records" / f"look-{i:05d}.json", spec=study, imported=work / "imported" / f"{i:05d}.h5ad")
        for i, study in enumerate(spec.studies)
    ]


def _parts(survey: dict[str, Any], shard_cells: int) -> Iterator[tuple[int, int]]:
    """First row and number of cells of each task: of a shard's, or of all where rows cannot be read one by one."""
    step = survey["cells"] if survey["by_column"] else shard_cells
    for first in range(0, survey["cells"], step):
        yield first, min(step, survey["cells"] - first)


def _imported(survey: dict[str, Any], work: Path, i: int) -> Path | None:
    return work / "imported" / f"{i:05d}.h5ad" if survey["imported"] else None


def measures(spec: CorpusSpec, surveys: Sequence[dict[str, Any]], work: Path, block_values: int) -> list[list[Measure]]:
    """Tasks that add up the genes of each study."""
    return [
        [
            Measure(
                record=work / "records" / f"genes-{i:05d}-{part:05d}.json",
                spec=study,
                imported=_imported(survey, work, i),
                first=first,
                cells=cells,
                values=block_values,
            )
            for part, (first, cells) in enumerate(_parts(survey, spec.shard_cells))
        ]
        for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True))
    ]


def donor_codes(spec: CorpusSpec, surveys: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Code of each donor: group of studies and name."""
    number = count()
    out: dict[tuple[str, str], int] = {}
    for study, survey in zip(spec.studies, surveys, strict=True):
        for name in survey["donors"]:
            if (study.group, name) not in out:
                out[study.group, name] = next(number)
    return out


def writes(
    spec: CorpusSpec,
    surveys: Sequence[dict[str, Any]],
    donors: dict[tuple[str, str], int],
    work: Path,
    block_values: int,
) -> Iterator[Write]:
    """Tasks that write the cells of each study, their shards numbered in the order of the corpus."""
    number = 0
    for i, (study, survey) in enumerate(zip(spec.studies, surveys, strict=True)):
        for first, cells in _parts(survey, spec.shard_cells):
            yield Write(
                record=work / "records" / f"write-{number:06d}.json",
                spec=study,
                imported=_imported(survey, work, i),
                folder=work / "corpus",
                study=i,
                number=number,
                first=first,
                cells=cells,
                shard_cells=spec.shard_cells,
                donors={name: donors[study.group, name] for name in survey["donors"]},
                values=block_values,
            )
            number += -(-cells // spec.shard_cells)
