"""Speed options of generate change nothing but speed, except another precision."""

import os
import socket
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest

import scmulan
from scmulan.errors import ScmulanError
from scmulan.infer.precision import int8_available


def same(a, b):
    return np.array_equal(a.layers["level"].toarray(), b.layers["level"].toarray()) and a.obs.equals(b.obs)


@pytest.mark.parametrize("rule", ["exact", "release"])
def test_cells_depend_on_neither_draft_nor_batch(random_model, rule):
    def generate(**options):
        return scmulan.tl.generate(random_model, {"organ": "Blood"}, n=7, rule=rule, max_words=30, **options)

    cells = generate(draft=1)
    assert same(cells, generate()) and same(cells, generate(draft=9)) and same(cells, generate(batch_size=2))


def test_precision_is_applied_and_recorded(random_model):
    plain = scmulan.tl.generate(random_model, n=6, rule="exact", max_words=60)
    assert plain.uns["scmulan"]["parameters"]["generate"]["precision"] == "fp32"
    for precision in ["bf16", *(["int8"] if int8_available() else [])]:
        other = scmulan.tl.generate(random_model, n=6, rule="exact", max_words=60, precision=precision)
        assert other.uns["scmulan"]["parameters"]["generate"]["precision"] == precision
        assert other.obs["words"].mean() == pytest.approx(plain.obs["words"].mean(), rel=0.5)
    assert random_model.network.precision == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draft": 0}, "draft is 0"), ({"draft": 33}, "at most 32"), ({"batch_size": 0}, "batch_size is 0")],
)
def test_refuses(random_model, options, message):
    with pytest.raises(ScmulanError, match=message):
        scmulan.tl.generate(random_model, n=1, **options)


@pytest.mark.parametrize("rule", ["default", "exact"])
def test_two_processes_generate_the_cells_of_one(tmp_path, rule):
    alone, shared = tmp_path / "alone.h5ad", tmp_path / "shared.h5ad"
    options = ["--set", "organ=Blood", "-n", "5", "--rule", rule, "--max-words", "40", "--draft", "4"]
    command = [sys.executable, "-m", "scmulan", "generate", *options, "--device", "cpu", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(alone)], check=True, env=environment, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [subprocess.Popen([*command, str(shared)], env={**environment, "RANK": str(r)}) for r in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    a, b = ad.read_h5ad(alone), ad.read_h5ad(shared)
    assert a.n_obs == 5 and (a.layers["level"] != b.layers["level"]).nnz == 0
    assert (a.obs["words"] == b.obs["words"]).all()
