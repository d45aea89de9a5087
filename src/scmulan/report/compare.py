"""Comparison of generated cells with real ones, on the same genes and with the same levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from scipy.spatial import cKDTree

from scmulan._keys import UNKNOWN
from scmulan.errors import InputError
from scmulan.report.layout import MIN_CELLS_FOR_UMAP, Layout, lay_out, principal_components, sample_rows
from scmulan.report.markers import read_log1p
from scmulan.report.results import Results
from scmulan.vocab.binning import LEVELS, tokenize
from scmulan.vocab.genes import match_genes
from scmulan.vocab.matrix import ExpressionMatrix, choose_matrix
from scmulan.vocab.ontology import Ontology
from scmulan.vocab.vocabulary import Family

MAX_CELLS = 1000  # of each group
MAX_PROMPTS = 4
N_NEIGHBOURS = 15
N_COMPONENTS = 30
MIN_CELLS = 20  # fewer cells say too little about which genes a type has
PROMPT_PREFIX = "prompt_"
FIELD_NAMES = {Family.FINE: "cell type", Family.COARSE: "coarse cell type"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Summary of a group of cells."""

    n_genes: np.ndarray
    """``[cells]``: number of genes of each cell."""
    mean: np.ndarray
    """``[genes]``: mean level, 0 where a cell lacks the gene."""
    detected: np.ndarray
    """``[genes]``: fraction of the cells that have the gene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileCorrelation:
    """Similarity of two groups of cells."""

    mean: float
    """Pearson's r over genes of the mean levels."""
    detected: float
    """Pearson's r over genes of the fractions of cells that have the gene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Generated cells of one prompt beside the real cells of its type."""

    prompt: dict[str, str]
    """Field → word, in plain names; empty for cells generated without a prompt."""
    requested_type: str | None
    """Type (or coarse type) in the prompt, or None."""
    real_types: list[str]
    """Predicted types of the real cells compared with: the requested one and finer ones."""
    generated_cells: int
    """Generated cells of this prompt."""
    incomplete: int
    """Those that were cut off at the maximum length."""
    real_cells: int
    """Real cells of the type in the file."""
    compared: tuple[int, int]
    """Generated and real cells that were compared."""
    genes: int
    """Genes that both have."""
    mean_generated_genes: float
    """Mean number of genes of a generated cell, including genes that the real data lack."""
    generated: Profile
    """The generated cells."""
    real: Profile | None
    """The real cells of the type; None where there are none."""
    correlation: ProfileCorrelation | None
    """Generated against real cells of the type."""
    halves: ProfileCorrelation | None
    """One random half of the real cells against the other: as similar as chance allows."""
    others: ProfileCorrelation | None
    """Real cells of other types against those of the type: how similar any cells are."""
    neighbours: tuple[float, float, float] | None
    """Fraction of real cells of the type among the nearest real cells of a generated cell, of a real cell of the type,
    and among all real cells compared."""
    layout: Layout
    """Coordinates of each cell drawn."""
    group: np.ndarray
    """``generated``, ``real`` or ``other`` for each cell drawn."""


def compare(annotated: AnnData, results: Results, generated: AnnData, matrix: ExpressionMatrix) -> list[Comparison]:
    """Compare generated cells with the real cells of the types in their prompts, prompt by prompt.

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
    rows_of_prompt: dict[tuple[tuple[str, str], ...], list[int]] = {}
    columns = _prompt_columns(generated)
    for row, words in enumerate(generated.obs[columns].astype(object).itertuples(index=False, name=None)):
        prompt = tuple(
            (c.removeprefix(PROMPT_PREFIX), str(w)) for c, w in zip(columns, words, strict=True) if w == w and w
        )
        rows_of_prompt.setdefault(prompt, []).append(row)
    largest = sorted(rows_of_prompt.items(), key=lambda item: -len(item[1]))[:MAX_PROMPTS]
    cells = _SharedGenes(annotated, results, generated, matrix)
    return [cells.compare(dict(prompt), np.array(rows)) for prompt, rows in largest]


def count_prompts(generated: AnnData) -> int:
    """Count the distinct prompts of generated cells."""
    columns = _prompt_columns(generated)
    return len(generated.obs[columns].astype(str).drop_duplicates()) if columns else 1


def _prompt_columns(generated: AnnData) -> list[str]:
    return [str(c) for c in generated.obs if str(c).startswith(PROMPT_PREFIX)]


class _SharedGenes:
    """Real and generated cells as levels of the genes that both have."""

    def __init__(self, annotated: AnnData, results: Results, generated: AnnData, matrix: ExpressionMatrix) -> None:
        genes = [str(name) for name in generated.var_names]
        match = match_genes(matrix.var, genes, source="the annotated cells", warn_below=0.0)
        shared_index = {gene: i for i, gene in enumerate(match.found)}
        self.generated_columns = np.array([shared_index.get(gene, -1) for gene in genes], dtype=np.int32)
        self.real_columns = np.where(match.columns >= 0, self.generated_columns[match.columns], -1).astype(np.int32)
        self.n_genes = len(match.found)
        self.annotated, self.results, self.generated, self.matrix = annotated, results, generated, matrix
        self.generated_matrix = choose_matrix(generated, layer="X", matrix_kind="log1p")

    def compare(self, prompt: dict[str, str], rows: np.ndarray) -> Comparison:
        """Compare generated cells (rows of the generated file) with the real cells of the prompt's type."""
        requested_type, of_type = self._select_real(prompt)
        real_cells = np.flatnonzero(of_type)
        other_cells = np.flatnonzero(~of_type & (self.results.status != "empty"))
        generated_rows = rows[sample_rows(len(rows), MAX_CELLS)]
        real_rows = real_cells[sample_rows(len(real_cells), MAX_CELLS)]
        other_rows = other_cells[sample_rows(len(other_cells), MAX_CELLS)]
        both = np.sort(np.concatenate([real_rows, other_rows]))  # the matrix may be large: it is read once
        measured = self._levels(self.matrix, both, self.real_columns)
        real, other = (measured[np.isin(both, part)] for part in (real_rows, other_rows))
        generated = self._levels(self.generated_matrix, generated_rows, self.generated_columns)
        profile = _profile(real) if len(real) else None
        layout, neighbours = _joint_layout(generated, real, other)
        obs = self.generated.obs.iloc[rows]
        return Comparison(
            prompt={FIELD_NAMES.get(Family(f), f) if f in list(Family) else f: word for f, word in prompt.items()},
            requested_type=requested_type,
            real_types=sorted(set(self.results.label[of_type])) if requested_type else [],
            generated_cells=len(rows),
            incomplete=int((~obs["complete"].astype(bool)).sum()) if "complete" in obs else 0,
            real_cells=len(real_cells),
            compared=(len(generated), len(real)),
            genes=self.n_genes,
            mean_generated_genes=float(np.diff(read_log1p(self.generated_matrix, generated_rows).indptr).mean()),
            generated=_profile(generated),
            real=profile,
            correlation=_correlate(_profile(generated), profile) if profile else None,
            halves=_correlate_halves(real) if len(real) >= MIN_CELLS else None,
            others=_correlate(_profile(other), profile) if profile and len(other) >= MIN_CELLS else None,
            neighbours=neighbours,
            layout=layout,
            group=np.repeat(["generated", "real", "other"], [len(generated), len(real), len(other)]),
        )

    def _select_real(self, prompt: dict[str, str]) -> tuple[str | None, np.ndarray]:
        """Return the type in a prompt, and whether each real cell has this type or a finer one."""
        not_empty = self.results.status != "empty"
        for family, label in ((Family.FINE, self.results.label), (Family.COARSE, self.results.coarse)):
            if requested := prompt.get(str(family)):
                names: Sequence[str] = [name for name in dict.fromkeys(label[not_empty]) if name != UNKNOWN]
                is_kind = Ontology.load().label_matrix([requested, *names])[0, 1:]
                kinds = [name for name, kind in zip(names, is_kind, strict=True) if kind]
                return requested, not_empty & np.isin(label, kinds)
        return None, not_empty

    def _levels(self, matrix: ExpressionMatrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return levels 0…10 of some cells, uint8 ``[cells, genes]``, relative to each cell's largest shared value."""
        levels = np.zeros((len(rows), self.n_genes), dtype=np.uint8)
        if len(rows):
            tokens = tokenize(read_log1p(matrix, rows), columns, self.n_genes, matrix_kind="log1p")
            levels[np.repeat(np.arange(len(rows)), tokens.lengths), tokens.gene] = tokens.level
        return levels


def _profile(levels: np.ndarray) -> Profile:
    return Profile(n_genes=(levels > 0).sum(1), mean=levels.mean(0), detected=(levels > 0).mean(0))


def _correlate(one: Profile, other: Profile) -> ProfileCorrelation:
    return ProfileCorrelation(mean=_pearson(one.mean, other.mean), detected=_pearson(one.detected, other.detected))


def _correlate_halves(levels: np.ndarray) -> ProfileCorrelation:
    order = np.random.default_rng(0).permutation(len(levels))
    half = len(order) // 2
    return _correlate(_profile(levels[order[:half]]), _profile(levels[order[half:]]))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's r, NaN where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def _joint_layout(
    generated: np.ndarray, real: np.ndarray, other: np.ndarray
) -> tuple[Layout, tuple[float, float, float] | None]:
    """Lay out all cells together, and find the nearest real cells of each (see ``Comparison.neighbours``).

    The principal components are those of the real cells where there are enough, so that what generated cells lack does
    not turn them.
    """
    everyone = np.concatenate([generated, real, other]).astype(np.float32) / LEVELS
    measured = everyone[len(generated) :]
    basis = measured if len(measured) >= MIN_CELLS_FOR_UMAP else everyone
    _, mean, directions = principal_components(basis, N_COMPONENTS)
    scores = (everyone - mean) @ directions
    layout = lay_out(scores)
    if not len(real) or not len(other) or len(measured) < MIN_CELLS_FOR_UMAP:
        return layout, None
    points = scores[len(generated) :]
    is_of_type = np.arange(len(points)) < len(real)
    tree = cKDTree(points)
    near_generated = tree.query(scores[: len(generated)], N_NEIGHBOURS)[1]
    near_real = tree.query(points[: len(real)], N_NEIGHBOURS + 1)[1][:, 1:]  # the nearest is the cell itself
    return layout, (
        float(is_of_type[near_generated].mean()),
        float(is_of_type[near_real].mean()),
        float(is_of_type.mean()),
    )
