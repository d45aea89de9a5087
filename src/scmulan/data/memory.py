"""Cells held in memory: what training on a few files, and fine-tuning, need.

Files become :class:`StudyCells` (harmonised genes, no vocabulary yet); :func:`build_vocabulary` chooses the tokens of a
new vocabulary; :func:`build_store` brings all cells into it. :func:`store_from_adata` does the same for one AnnData and
a vocabulary that exists, with genes matched as in annotation.

Values stay as they were measured (counts, or log1p values where a study has no counts): down-sampling, gene dropout and
binning happen while batches are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scmulan.data.gene_selection import GeneScores
from scmulan.data.readers import hash_input, matrix_of, open_study, resolve_columns
from scmulan.data.spec import StudySpec
from scmulan.data.store import CellSource
from scmulan.vocab.genes import GeneMatch, GeneTable, match_genes
from scmulan.vocab.matrix import ExpressionMatrix, MatrixKind, choose_matrix, column_map
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@dataclass
class StudyCells:
    """Cells of one file with harmonised genes.

    Parameters
    ----------
    spec : StudySpec
        Where they come from.
    genes : list of str
        Approved symbols of the columns, sorted; columns without one are left out.
    matrix : scipy.sparse.csr_matrix, float32 [cells, genes]
        Counts, or log1p values.
    total : numpy.ndarray, float32 [cells]
        Sum over all columns of the file (counts, or counts per 10,000).
    matrix_kind : {"counts", "log1p"}
        What the matrix holds.
    metadata : dict of Family to numpy.ndarray
        Name of each family per cell; empty where unknown.
    sha256 : str
        Hash of the file.
    """

    spec: StudySpec
    genes: list[str]
    matrix: sp.csr_matrix
    total: np.ndarray
    matrix_kind: str
    metadata: dict[Family, np.ndarray]
    sha256: str

    @classmethod
    def read(cls, spec: StudySpec, table: GeneTable) -> "StudyCells":
        """Read one file of any format: choose its matrix, resolve its genes, sum duplicates on counts."""
        with open_study(spec) as adata:
            chosen = matrix_of(adata, spec)
            genes, columns = resolve_columns(chosen.var, table)
            matrix, total = _read_values(chosen, columns, len(genes))
            metadata = {f: names.to_numpy(dtype=object) for f, names in spec.metadata(adata.obs).items()}
        return cls(spec, genes, matrix, total, chosen.matrix_kind, metadata, hash_input(spec.file))


@dataclass
class CellStore(CellSource):
    """Cells in memory, in the genes of one vocabulary.

    Parameters
    ----------
    matrix : scipy.sparse.csr_matrix, float32 [cells, vocabulary genes]
        Counts, or log1p values where ``logged``.
    total, logged, study, studies, measured, metadata
        See :class:`scmulan.data.store.CellSource`.
    """

    matrix: sp.csr_matrix
    total: np.ndarray
    logged: np.ndarray
    study: np.ndarray
    studies: list[str]
    measured: np.ndarray
    metadata: np.ndarray
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.diff(self.matrix.indptr).astype(np.int64)

    def __len__(self) -> int:
        return len(self.total)

    def rows(self, cells: np.ndarray) -> sp.csr_matrix:
        """Return values of some cells: CSR float32 ``[cells, vocabulary genes]``, in the order requested."""
        return self.matrix[cells]


def read_studies(specs: Sequence[StudySpec]) -> list[StudyCells]:
    """Read every file of a spec.

    Raises
    ------
    InputError, MatrixError
        If a file cannot be read, or holds no usable expression.
    """
    table = GeneTable.load()
    return [StudyCells.read(spec, table) for spec in specs]


def build_vocabulary(studies: Sequence[StudyCells], genes: int) -> Vocabulary:
    """Build a vocabulary of the most variable genes over all studies and of every metadata name that occurs.

    Parameters
    ----------
    studies : sequence of StudyCells
        Cells to choose from.
    genes : int
        Number of gene tokens.

    Returns
    -------
    Vocabulary
    """
    scores = GeneScores()
    for study in studies:
        scores.add(study.genes, study.matrix, study.total, study.matrix_kind)
    names = {family: {n for s in studies for n in s.metadata.get(family, ()) if n} for family in METADATA}
    return Vocabulary.build(scores.best(genes), {family: sorted(found) for family, found in names.items()})


def build_store(studies: Sequence[StudyCells], vocabulary: Vocabulary) -> CellStore:
    """Bring all cells into the tokens of a vocabulary; metadata names that it lacks become unknown.

    Parameters
    ----------
    studies : sequence of StudyCells
        Cells, file by file.
    vocabulary : Vocabulary
        Its genes become the columns.

    Returns
    -------
    CellStore
        Cells in the order of ``studies``.
    """
    index = {name: i for i, name in enumerate(vocabulary.genes)}
    n_genes = len(index)
    matrices = []
    measured = np.zeros((len(studies), n_genes), dtype=bool)
    for i, study in enumerate(studies):
        columns = np.array([index.get(gene, -1) for gene in study.genes], dtype=np.int64)
        measured[i, columns[columns >= 0]] = True
        matrix = (study.matrix @ column_map(columns, n_genes)).tocsr()
        matrix.sort_indices()
        matrices.append(matrix)
    cells = [len(study.total) for study in studies]
    return CellStore(
        matrix=sp.vstack(matrices, format="csr").astype(np.float32),
        total=np.concatenate([study.total for study in studies]),
        logged=np.repeat([study.matrix_kind == "log1p" for study in studies], cells),
        study=np.repeat(np.arange(len(studies)), cells),
        studies=[study.spec.name for study in studies],
        measured=measured,
        metadata=np.concatenate([token_ids(n, vocabulary, s.metadata) for n, s in zip(cells, studies, strict=True)]),
    )


def store_from_adata(
    adata: ad.AnnData,
    vocabulary: Vocabulary,
    metadata: Mapping[Family, np.ndarray],
    *,
    name: str,
    layer: str | None = None,
    matrix_kind: MatrixKind | None = None,
    min_genes: int = 20,
) -> tuple[CellStore, ExpressionMatrix, GeneMatch]:
    """Read all cells of an AnnData as one study.

    Parameters
    ----------
    adata : AnnData
        Cells × genes, in memory or backed.
    vocabulary : Vocabulary
        Its genes are matched as in annotation (symbols, aliases, Ensembl ids; duplicates summed on counts), so that a
        model is trained on what it will read later.
    metadata : mapping of Family to numpy.ndarray
        Name of each family per cell; names that are empty, or not in the vocabulary, are unknown.
    name : str
        Name of the study.
    layer, matrix_kind : optional
        Which matrix, and what it holds; detected by default.
    min_genes : int
        Smallest number of vocabulary genes that the input must have.

    Returns
    -------
    store : CellStore
        The cells.
    matrix : ExpressionMatrix
        The matrix that was chosen.
    match : GeneMatch
        Which genes were found.

    Raises
    ------
    MatrixError
        If no matrix holds usable expression.
    GeneError
        If too few genes are known.
    """
    chosen = choose_matrix(adata, layer=layer, matrix_kind=matrix_kind)
    n_genes = len(vocabulary.genes)
    match = match_genes(chosen.var, vocabulary.genes, min_genes=min_genes, source=name)
    matrix, total = _read_values(chosen, match.columns, n_genes)
    measured = np.zeros((1, n_genes), dtype=bool)
    measured[0, match.columns[match.columns >= 0]] = True
    store = CellStore(
        matrix=matrix,
        total=total,
        logged=np.full(adata.n_obs, chosen.matrix_kind == "log1p"),
        study=np.zeros(adata.n_obs, dtype=np.int64),
        studies=[name],
        measured=measured,
        metadata=token_ids(adata.n_obs, vocabulary, metadata),
    )
    return store, chosen, match


def take(source: CellSource, cells: np.ndarray) -> CellStore:
    """Copy some cells of a source into memory, in the order of ``cells`` (int64 indices)."""
    cells = np.asarray(cells)
    return CellStore(
        matrix=source.rows(cells),
        total=source.total[cells],
        logged=source.logged[cells],
        study=source.study[cells],
        studies=source.studies,
        measured=source.measured,
        metadata=source.metadata[cells],
    )


def token_ids(cells: int, vocabulary: Vocabulary, metadata: Mapping[Family, np.ndarray]) -> np.ndarray:
    """Look up metadata names: int32 ``[cells, families]``, −1 where a name is empty or not in the vocabulary."""
    ids = np.full((cells, len(METADATA)), -1, dtype=np.int32)
    for column, family in enumerate(METADATA):
        for name in set(metadata.get(family, ())) - {""}:
            found = vocabulary.find(family, name)
            if found is not None:
                ids[metadata[family] == name, column] = found
    return ids


def _read_values(matrix: ExpressionMatrix, columns: np.ndarray, n_genes: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Read all cells as :meth:`ExpressionMatrix.read_amounts` does, but in values of the matrix's own kind, sorted."""
    values, total = matrix.read_amounts(columns, n_genes)
    values.sort_indices()
    if matrix.matrix_kind == "log1p":
        values.data = np.log1p(values.data)
    return values, total
