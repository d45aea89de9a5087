"""The benchmarks' yardstick reproduces the stored outputs of the release."""

import numpy as np
import pytest

from scmulan.benchmarks.release_way import ReleaseDecoder
from scmulan.model.loading import load_model
from scmulan.vocab.vocabulary import Family


@pytest.mark.parametrize("cached", [False, True])
def test_it_reproduces_the_stored_outputs(stored, imported, cached):
    model = load_model(imported["nobias"])
    with np.load(stored["nobias"]) as file:
        arrays = {name: file[name] for name in file.files}
    decoder = ReleaseDecoder(network=model.network, end=model.vocabulary.end, cached=cached)
    genes = model.vocabulary.ids(Family.GENE)
    prompt_token = model.vocabulary.prompts["annotate"]
    expected = arrays["annotation_ids_kv" if cached else "annotation_ids"]
    for i in range(8):
        entity, value, embedding = decoder.annotate(arrays["expression"][i], genes, prompt_token)
        wanted = expected[i][expected[i] >= 0].tolist()
        assert entity == wanted
        if not cached:
            assert value == arrays["annotation_values"][i][: len(wanted)].tolist()
            np.testing.assert_allclose(embedding, arrays["embedding"][i], atol=1e-4)
