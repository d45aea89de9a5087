"""Options of generate that change the speed, not the cells."""

import anndata as ad
import pytest


def test_speed_options(scmulan, folder, tiny):
    command = ("generate", "--set", "organ=Blood", "-n", 5, "--model", tiny, "--rule", "exact", "--max-words", 30)
    assert scmulan(*command, "-o", "one.h5ad").code == 0
    found = scmulan(*command, "-o", "two.h5ad", "--draft", 1, "--batch-size", 2, "--precision", "fp32", "--json").json
    one, two = ad.read_h5ad("one.h5ad"), ad.read_h5ad("two.h5ad")
    assert (one.X != two.X).nnz == 0
    assert found["parameters"]["precision"] == "fp32"
    assert (
        scmulan(*command, "-o", "three.h5ad", "--draft", "auto", "--batch-size", "auto", "--precision", "bf16").code
        == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "many"], "'many' is neither 'auto' nor a positive number"),
        (["--draft", "33"], "draft is 33: expected at most 32 words"),
        (["--batch-size", "0"], "'0' is neither 'auto' nor a positive number"),
        (["--precision", "int4"], "int4"),
    ],
)
def test_what_it_refuses(scmulan, folder, tiny, options, message):
    assert message in scmulan("generate", "-o", "out.h5ad", "--model", tiny, *options).refused()
    assert not list(folder.iterdir())
