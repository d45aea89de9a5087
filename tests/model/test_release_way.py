"""The benchmarks' yardstick says what the release says: its stored outputs hold for it too."""

import numpy as np
import pytest

from scmulan.benchmarks.release_way import ReleaseWay
from scmulan.model.loading import load_model
from scmulan.vocab.vocabulary import Family


@pytest.mark.parametrize("cached", [False, True])
def test_it_says_what_the_release_says(stored, imported, cached):
    model = load_model(imported["nobias"])
    with np.load(stored["nobias"]) as file:
        arrays = {name: file[name] for name in file.files}
    way = ReleaseWay(network=model.network, end=model.vocabulary.end, cached=cached)
    genes = model.vocabulary.ids(Family.GENE)
    ask = model.vocabulary.prompts["annotate"]
    expected = arrays["annotation_ids_kv" if cached else "annotation_ids"]
    for i in range(8):
        entity, value, embedding = way.annotate(arrays["expression"][i], genes, ask)
        wanted = expected[i][expected[i] >= 0].tolist()
        assert entity == wanted
        if not cached:
            assert value == arrays["annotation_values"][i][: len(wanted)].tolist()
            np.testing.assert_allclose(embedding, arrays["embedding"][i], atol=1e-4)
