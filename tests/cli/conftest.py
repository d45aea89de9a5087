"""A small model with real vocabulary, a small file of real genes, and the command line as a function."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scmulan.cli.__main__ import main
from scmulan.model.loading import save_model
from scmulan.model.network import Mulan, MulanConfig
from scmulan.vocab.vocabulary import Family, Vocabulary

GENES = Vocabulary.published().genes[:300]
TYPES = ["B cell", "T cell", "monocyte", "natural killer cell"]


@dataclass(frozen=True)
class Run:
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be JSON and nothing else."""
        return json.loads(self.out)

    def refused(self, logged: bool = False) -> str:
        """Return the error of a command that must have refused its input: one line, after those of a log if allowed."""
        assert self.code == 2, (self.out, self.err)
        assert not self.out
        *log, error = self.err.splitlines()
        assert error.startswith("scmulan: error: ")
        assert logged or not log
        return error


@pytest.fixture
def scmulan(capfd) -> Callable[..., Run]:
    """Run the command line in this process."""

    def run(*args: object) -> Run:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Run(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Model folder: random weights, real words."""
    metadata = {
        Family.ORGAN: ["Blood", "Brain"],
        Family.COARSE: ["lymphocyte", "myeloid leukocyte"],
        Family.FINE: TYPES,
    }
    vocabulary = Vocabulary.build(GENES, metadata)
    config = MulanConfig(vocabulary=len(vocabulary), layers=1, heads=2, width=16, set_state=True, value_spread=True)
    with torch.random.fork_rng():
        network = Mulan(config).initialise(0).eval()
    card = {"name": "tiny", "description": "Random weights.", "objective": "next_word"}
    return save_model(tmp_path_factory.mktemp("models") / "tiny", network, vocabulary, card)


@pytest.fixture(scope="session")
def make_cells() -> Callable[..., ad.AnnData]:
    """Make new cells that a test may change."""
    return some_cells


def some_cells(n: int = 40) -> ad.AnnData:
    """Counts of cells with a label."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"label": pd.Categorical(rng.choice(TYPES, n))}, index=[f"cell-{i}" for i in range(n)])
    x = sp.csr_matrix(rng.poisson(0.4, (n, len(GENES))).astype(np.float32))
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index(GENES)))


@pytest.fixture(scope="session")
def cells(tmp_path_factory) -> Path:
    """File of cells that no test changes."""
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    some_cells().write_h5ad(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
