"""Shared fixtures: the real cells beside the checkout, and small real inputs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real labelled cells beside the checkout; tests that need it skip elsewhere."""
    folder = Path(os.environ.get("SCMULAN_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the real cells (shared/data beside the checkout) are not here")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is measured of the machine while tests run is not what its user should find later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Untrained model of real words, saved and loaded like any other: for tests of everything but skill."""
    from scmulan.model.loading import load, save_model
    from scmulan.model.network import Mulan, MulanConfig
    from scmulan.vocab.vocabulary import Family, Vocabulary

    genes = Vocabulary.published().genes[:300]
    words = {
        Family.ORGAN: ["Blood", "Brain"],
        Family.COARSE: ["B cell", "T cell"],
        Family.FINE: ["B cell", "CD4-positive, alpha-beta T cell", "natural killer cell"],
    }
    vocabulary = Vocabulary.build(genes, words)
    config = MulanConfig(vocabulary=len(vocabulary), layers=2, heads=2, width=32, set_state=True, value_spread=True)
    folder = tmp_path_factory.mktemp("models") / "random"
    card = {"name": "random", "objective": "next_word", "covered": 0.4}
    save_model(folder, Mulan(config).initialise(3).eval(), vocabulary, card)
    return load(folder, device="cpu")
