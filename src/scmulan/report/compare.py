"""Generated cells beside real ones, in the same genes and the same bins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from scipy.spatial import cKDTree

from scmulan._keys import UNKNOWN
from scmulan.errors import InputError
from scmulan.report.layout import FEW, Plane, lay_out, principal_components, sample
from scmulan.report.markers import read_log1p
from scmulan.report.results import Results
from scmulan.vocab.binning import LEVELS, tokenize
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import Family

MOST_CELLS = 1000
MOST_PROMPTS = 4
NEIGHBOURS = 15
COMPONENTS = 30
# Fewer cells say too little about which genes a type has.
_ENOUGH = 20
_PREFIX = "prompt_"
_FIELDS = {Family.FINE: "cell type", Family.COARSE: "coarse cell type"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a group of cells looks like, gene by gene and word by word."""

    words: np.ndarray
    """Words of each cell, int."""
    mean: np.ndarray
    """Mean bin of each gene, 0 where a cell lacks it."""
    detected: np.ndarray
    """Share of the cells that have the gene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How alike two groups of cells are in their genes."""

    mean: float
    """Pearson's r of the genes' mean bins."""
    detected: float
    """Pearson's r of the genes' shares of cells that have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Generated cells of one prompt beside the real cells of its type."""

    prompt: dict[str, str]
    """Field to word, in plain names; empty for cells written without a prompt."""
    wanted: str | None
    """Type (or coarse type) that the prompt asked for, or None."""
    real_types: list[str]
    """Predicted types of the real cells compared with: the wanted one and finer ones."""
    generated_cells: int
    """Generated cells of this prompt."""
    incomplete: int
    """Those that were cut off at the longest sentence allowed."""
    real_cells: int
    """Real cells of the type in the file."""
    compared: tuple[int, int]
    """Generated and real cells looked at."""
    genes: int
    """Genes that both have."""
    words_in_all: float
    """Mean words of a generated cell over all genes that were written, those that the data lack included."""
    generated: Profile
    """The generated cells."""
    real: Profile | None
    """The real cells of the type; None where there are none."""
    agreement: Agreement | None
    """Generated against real cells of the type."""
    halves: Agreement | None
    """One random half of the real cells against the other: as near as chance allows."""
    others: Agreement | None
    """Real cells of other types against those of the type: how much any cell agrees."""
    neighbours: tuple[float, float, float] | None
    """Share of real cells of the type among the nearest real cells of a generated cell, of a real cell of the type,
    and among all real cells looked at."""
    plane: Plane
    """Place of each cell drawn."""
    kind: np.ndarray
    """``generated``, ``real`` or ``other`` for each cell drawn."""


def compare(annotated: AnnData, results: Results, generated: AnnData, matrix: ExpressionMatrix) -> list[Comparison]:
    """Compare generated cells with the real cells of the types that their prompts asked for, prompt by prompt.

    Parameters
    ----------
    annotated
        The real cells.
    results
        Their annotation.
    generated
        From :func:`scmulan.tl.generate`; several such files may be joined.
    matrix
        Expression of the real cells.

    Returns
    -------
    list of Comparison
        One per prompt, those with most cells first; at most four.

    Raises
    ------
    InputError
        If there are no generated cells.
    """
    if not generated.n_obs:
        raise InputError("the generated file has no cells (0 rows): nothing can be compared")
    prompts: dict[tuple[tuple[str, str], ...], list[int]] = {}
    columns = [str(c) for c in generated.obs if str(c).startswith(_PREFIX)]
    for row, words in enumerate(generated.obs[columns].astype(object).itertuples(index=False, name=None)):
        prompt = tuple((c.removeprefix(_PREFIX), str(w)) for c, w in zip(columns, words, strict=True) if w == w and w)
        prompts.setdefault(prompt, []).append(row)
    largest = sorted(prompts.items(), key=lambda item: -len(item[1]))[:MOST_PROMPTS]
    words = _Words(annotated, results, generated, matrix)
    return [words.compare(dict(prompt), np.array(rows)) for prompt, rows in largest]


def count_prompts(generated: AnnData) -> int:
    """Count the different prompts among generated cells."""
    columns = [c for c in generated.obs if str(c).startswith(_PREFIX)]
    return len(generated.obs[columns].astype(str).drop_duplicates()) if columns else 1


class _Words:
    """Real and generated cells as bins of the genes that both have."""

    def __init__(self, annotated: AnnData, results: Results, generated: AnnData, matrix: ExpressionMatrix) -> None:
        genes = [str(name) for name in generated.var_names]
        match = match_genes(matrix.var, genes, source="the annotated cells", warn_below=0.0)
        place = {gene: i for i, gene in enumerate(match.found)}
        to_common = np.array([place.get(gene, -1) for gene in genes], dtype=np.int32)
        self.columns = np.where(match.columns >= 0, to_common[match.columns], -1).astype(np.int32)
        self.generated_columns = to_common
        self.genes = len(match.found)
        self.annotated, self.results, self.generated, self.matrix = annotated, results, generated, matrix
        self.written = choose_matrix(generated, layer="X", matrix_kind="log1p")

    def compare(self, prompt: dict[str, str], rows: np.ndarray) -> Comparison:
        chosen = rows[sample(len(rows), MOST_CELLS)]
        written = self._bins(self.written, chosen, self.generated_columns)
        wanted, own = self._real(prompt)
        cells = np.flatnonzero(own)
        others = np.flatnonzero(~own & (self.results.status != "empty"))
        real_rows, other_rows = cells[sample(len(cells), MOST_CELLS)], others[sample(len(others), MOST_CELLS)]
        both = np.sort(np.concatenate([real_rows, other_rows]))  # the matrix may be large: it is read once
        measured = self._bins(self.matrix, both, self.columns)
        real, other = (measured[np.isin(both, part)] for part in (real_rows, other_rows))
        profile = _profile(real) if len(real_rows) else None
        halves = None
        if len(real_rows) >= _ENOUGH:
            order = np.random.default_rng(0).permutation(len(real_rows))
            half = len(order) // 2
            halves = _agreement(_profile(real[order[:half]]), _profile(real[order[half:]]))
        plane, neighbours = _joint(written, real, other)
        obs = self.generated.obs.iloc[rows]
        return Comparison(
            prompt={_FIELDS.get(Family(f), f) if f in list(Family) else f: word for f, word in prompt.items()},
            wanted=wanted,
            real_types=sorted(set(self.results.label[own])) if wanted else [],
            generated_cells=len(rows),
            incomplete=int((~obs["complete"].astype(bool)).sum()) if "complete" in obs else 0,
            real_cells=len(cells),
            compared=(len(chosen), len(real_rows)),
            genes=self.genes,
            words_in_all=float(np.diff(read_log1p(self.written, chosen).indptr).mean()),
            generated=_profile(written),
            real=profile,
            agreement=_agreement(_profile(written), profile) if profile else None,
            halves=halves,
            others=_agreement(_profile(other), profile) if profile and len(other_rows) >= _ENOUGH else None,
            neighbours=neighbours,
            plane=plane,
            kind=np.repeat(["generated", "real", "other"], [len(chosen), len(real_rows), len(other_rows)]),
        )

    def _real(self, prompt: Mapping[str, str]) -> tuple[str | None, np.ndarray]:
        """Type that a prompt asks for, and which real cells were given this type or a finer one."""
        seen = self.results.status != "empty"
        for family, label in ((Family.FINE, self.results.label), (Family.COARSE, self.results.coarse)):
            if wanted := prompt.get(str(family)):
                names: Sequence[str] = [name for name in dict.fromkeys(label[seen]) if name != UNKNOWN]
                fits = Ontology.load().label_matrix([wanted, *names])[0, 1:]
                return wanted, seen & np.isin(label, [name for name, fit in zip(names, fits, strict=True) if fit])
        return None, seen

    def _bins(self, matrix: ExpressionMatrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bins 0…10 of some cells, uint8 ``[cells, genes]``, relative to each cell's largest value in these genes."""
        if not len(rows):
            return np.zeros((0, self.genes), dtype=np.uint8)
        words = tokenize(read_log1p(matrix, rows), columns, self.genes, matrix_kind="log1p")
        bins = np.zeros((len(rows), self.genes), dtype=np.uint8)
        bins[np.repeat(np.arange(len(rows)), words.lengths), words.gene] = words.level
        return bins


def _profile(bins: np.ndarray) -> Profile:
    return Profile(words=(bins > 0).sum(1), mean=bins.mean(0), detected=(bins > 0).mean(0))


def _agreement(one: Profile, two: Profile) -> Agreement:
    return Agreement(mean=_pearson(one.mean, two.mean), detected=_pearson(one.detected, two.detected))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r, NaN where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")


def _joint(written: np.ndarray, real: np.ndarray, other: np.ndarray) -> tuple[Plane, tuple[float, float, float] | None]:
    """Place all cells on one plane, and look at the nearest real cells of each.

    The directions are those of the real cells where there are enough: what generated cells lack cannot turn them.
    """
    everyone = np.concatenate([written, real, other]).astype(np.float32) / LEVELS
    measured = everyone[len(written) :]
    basis = measured if len(measured) >= FEW else everyone
    _, mean, directions = principal_components(basis, COMPONENTS)
    scores = (everyone - mean) @ directions
    plane = lay_out(scores)
    if not len(real) or not len(other) or len(measured) < FEW:
        return plane, None
    points = scores[len(written) :]
    is_real = np.arange(len(points)) < len(real)
    tree = cKDTree(points)
    near = tree.query(scores[: len(written)], NEIGHBOURS)[1]
    # The nearest cell of a real cell is itself.
    own = tree.query(points[: len(real)], NEIGHBOURS + 1)[1][:, 1:]
    return plane, (float(is_real[near].mean()), float(is_real[own].mean()), float(is_real.mean()))
