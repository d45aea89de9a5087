"""A small real network with random weights, and files of simulated cells of three types in two studies."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmulan.model.loading import LoadedModel, load_model, save_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.gene_table import GeneTable
from scmulan.vocab.vocabulary import Family, Vocabulary

GENES = [gene for gene in GeneTable.load().symbols if gene.isalnum()][:400]
TYPES = ("B cell", "CD14+ Monocyte", "NK")


def simulate(seed: int, n: int, genes: list[str], types: tuple[str, ...] = TYPES, gain: float = 6.0) -> ad.AnnData:
    """Poisson counts: genes of their own for each type, and a depth of its own for each cell and the study."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99).gamma(0.5, 1.0, size=len(GENES))
    labels = np.array(types)[rng.integers(len(types), size=n)]
    rate = np.tile(base, (n, 1)) * rng.lognormal(0, 0.3, size=(n, 1)) * rng.lognormal(0, 0.2, size=len(GENES))
    for number, name in enumerate(TYPES):
        rate[np.ix_(labels == name, np.arange(number * 20, number * 20 + 20))] += gain
    columns = [GENES.index(gene) for gene in genes]
    counts = sp.csr_matrix(rng.poisson(rate)[:, columns].astype(np.float32))
    obs = pd.DataFrame(
        {
            "label": pd.Categorical(labels),
            "tech": pd.Categorical(np.where(np.arange(n) % 2 == 0, "10x", "Drop-seq")),
            "organ": "blood",
            "study": f"study {seed}",
        },
        index=[f"cell-{seed}-{i}" for i in range(n)],
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes)))


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files: two to train on, one to test (some of its cells without label, fewer genes, another type)."""
    folder = tmp_path_factory.mktemp("cells")
    out = {name: folder / f"{name}.h5ad" for name in ("one", "two", "tested")}
    simulate(1, 150, GENES).write_h5ad(out["one"])
    simulate(2, 150, GENES[:350]).write_h5ad(out["two"])
    tested = simulate(3, 160, GENES[:60] + GENES[160:])
    labels = tested.obs["label"].astype(object)
    labels.iloc[:6] = ["", None, "", "platelet", "platelet", "platelet"]
    tested.obs["label"] = pd.Categorical(labels)
    tested.write_h5ad(out["tested"])
    return out


def random_model(genes: list[str], folder: Path) -> LoadedModel:
    vocabulary = Vocabulary.build(
        genes,
        {
            Family.ORGAN: ["Blood"],
            Family.TECHNOLOGY: ["10x", "Drop-seq"],
            Family.COARSE: ["B cell", "monocyte", "natural killer cell"],
            Family.FINE: ["B cell", "monocyte", "CD14-positive monocyte", "natural killer cell", "T cell"],
        },
    )
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=32, set_state=True, value_spread=True)
    save_model(folder, Mulan(config).initialise(3), vocabulary, {"name": "random", "objective": "next_word"})
    return load_model(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A network that knows the simulated genes and types, with random weights."""
    return random_model(GENES, tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="session")
def real_model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The same with genes of real cells."""
    genes = list(ad.read_h5ad(shared / "data" / "validation" / "10x_pbmc_3tech.h5ad", backed="r").var_names[:600])
    return random_model(genes, tmp_path_factory.mktemp("model") / "random")
