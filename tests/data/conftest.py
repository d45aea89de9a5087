"""Small files of cells, each of another kind, and the corpus that is built from them."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan.data.build import build
from scmulan.data.spec import read_corpus_spec
from scmulan.vocab.vocabulary import Vocabulary

GENES = Vocabulary.published().genes[:120]
TEXT = """
genes = 80
shard_cells = 40
{settings}
[columns]
organ = "tissue"
fine_type = "label"
donor = "donor"
[[study]]
file = "counts.h5ad"
[[study]]
file = "logged.h5ad"
fixed = {{ organ = "Blood", donor = "L" }}
[[study]]
file = "amounts.h5ad"
"""


def counts(cells: int, seed: int, genes: int = len(GENES)) -> np.ndarray:
    """Counts of cells of two kinds, as float32."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.6, 3.0, (2, genes))
    return rng.poisson(rates[np.arange(cells) % 2] * rng.lognormal(0, 0.3, (cells, 1))).astype(np.float32)


def table(cells: int, donors=("d1", "d2", "")) -> pd.DataFrame:
    """Columns of cells."""
    return pd.DataFrame(
        {
            "label": np.array(["T cell", "B cell", ""])[np.arange(cells) % 3],
            "tissue": "Lung",
            "donor": np.array(donors)[np.arange(cells) // 7 % len(donors)],
        },
        index=[f"c{i}" for i in range(cells)],
    )


def adata(x, names=GENES, obs=None) -> ad.AnnData:
    """Cells with their columns."""
    obs = table(x.shape[0]) if obs is None else obs
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=pd.Index(list(names), dtype=object)))


def write_files(folder) -> None:
    """Three studies: whole counts, log1p values with a gene in two columns, and fractional counts."""
    x = counts(100, 0)
    x[3, 5] = 200_000  # reads of one gene, beyond 16 bits
    adata(x).write_h5ad(folder / "counts.h5ad")
    y = np.log1p(counts(50, 1) / counts(50, 1).sum(1, keepdims=True) * 1e4)
    adata(y, [*GENES[:118], "no gene", f"{GENES[3]}-1"]).write_h5ad(folder / "logged.h5ad")
    z = counts(60, 2)
    z[45:] *= 1.37  # only the last shard has fractions
    adata(z).write_h5ad(folder / "amounts.h5ad")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Folder of three studies and ``spec.toml``."""
    folder = tmp_path_factory.mktemp("studies")
    write_files(folder)
    (folder / "spec.toml").write_text(TEXT.format(settings=""))
    return folder


@pytest.fixture(scope="session")
def corpus_folder(files, tmp_path_factory):
    """Corpus of the three studies: not to be changed."""
    out = tmp_path_factory.mktemp("corpora") / "three"
    build(read_corpus_spec(files / "spec.toml"), out)
    return out


@pytest.fixture(scope="session")
def made():
    """What makes cells."""
    return SimpleNamespace(genes=GENES, text=TEXT, adata=adata, counts=counts, table=table)
