"""Files of any size: in bounded memory, interrupted and resumed, shared among processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scmulan._progress import Progress
from scmulan.errors import OutputError
from scmulan.tl._block_store import PREFIX, BlockStore
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._files import annotate_file, embed_file

pytestmark = pytest.mark.filterwarnings("ignore::scmulan.vocab.genes.CoverageWarning")
SMALL_BLOCKS = ReadOptions(block_cells=8)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_cells(path, model, n=60, genes=80):
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(0.6, (n, genes)).astype(np.float32))
    adata = ad.AnnData(x)
    adata.var_names, adata.obs_names = model.vocabulary.genes[:genes], [f"cell-{i}" for i in range(n)]
    adata.write_h5ad(path)
    return path


@pytest.fixture
def source(tmp_path, random_model):
    return write_cells(tmp_path / "in.h5ad", random_model)


def same(a: Path, b: Path) -> bool:
    """Whether two outputs hold the same, value for value."""
    one, two = ad.read_h5ad(a), ad.read_h5ad(b)
    assert one.obs.equals(two.obs) and list(one.obsm) == list(two.obsm)
    assert (one.X != two.X).nnz == 0 and json.dumps(one.uns, default=str) == json.dumps(two.uns, default=str)
    return all(np.array_equal(one.obsm[key], two.obsm[key]) for key in one.obsm)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("verb", ["annotate", "embed"])
@pytest.mark.parametrize("end", [Interrupted, KeyboardInterrupt])
def test_an_interrupted_job_continues_where_it_was(source, tmp_path, random_model, monkeypatch, verb, end):
    options = {"model": random_model.folder, "reading": SMALL_BLOCKS}
    run = {"annotate": lambda out: annotate_file(source, out, embed=True, **options),
           "embed": lambda out: embed_file(source, out, **options)}[verb]  # fmt: skip
    run(tmp_path / "whole.h5ad")
    put, done = BlockStore.put, []

    def put_three(self, number, arrays):
        if len(done) == 3:
            raise end
        put(self, number, arrays)
        done.append(number)

    monkeypatch.setattr(BlockStore, "put", put_three)
    with pytest.raises(end):
        run(tmp_path / "out.h5ad")
    left = [name for name in os.listdir(tmp_path) if name.startswith(PREFIX)]
    assert len(left) == 1 and not (tmp_path / "out.h5ad").exists()

    def put_others(self, number, arrays):
        assert number not in done
        put(self, number, arrays)

    monkeypatch.setattr(BlockStore, "put", put_others)
    run(tmp_path / "out.h5ad")
    assert same(tmp_path / "out.h5ad", tmp_path / "whole.h5ad")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(PREFIX)]


def test_blocks_of_another_job_are_not_taken(source, tmp_path, random_model, monkeypatch):
    folders = set()
    monkeypatch.setattr(BlockStore, "remove", lambda self: folders.add(self.folder))
    out = tmp_path / "out.h5ad"

    def run(reading=SMALL_BLOCKS, **options):
        annotate_file(source, out, model=random_model.folder, force=True, reading=reading, **options)

    run()
    run(replace(SMALL_BLOCKS, batch_tokens=64))
    assert len(folders) == 1  # how many tokens go together changes no result
    run(threshold=0.7)
    run(rule="stepwise")
    run(replace(SMALL_BLOCKS, precision="bf16"))
    os.utime(source, ns=(1, 1))
    run()
    assert len(folders) == 5
    monkeypatch.undo()
    BlockStore.remove(BlockStore(folders.pop()))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(PREFIX)]


class Counted(Progress):
    def __init__(self):
        self.totals, self.advances = [], []

    @contextmanager
    def bar(self, total, unit="cells"):
        self.totals.append(total)
        yield self.advances.append


def test_progress_counts_every_cell_once(source, tmp_path, random_model):
    progress = Counted()
    out = tmp_path / "out.h5ad"
    annotate_file(source, out, model=random_model.folder, reading=SMALL_BLOCKS, progress=progress)
    assert progress.totals == [60] and sum(progress.advances) == 60


def test_blocks_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="run the same command again"):
        BlockStore(tmp_path / "taken").put(0, {"a": np.zeros(3)})


KILLED = """
import sys, time
from scmulan.tl._block_store import BlockStore
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._files import annotate_file
put = BlockStore.put
def slowly(self, number, arrays):
    put(self, number, arrays)
    print(number, flush=True)
    time.sleep(0.5)
if sys.argv[4] == "slow":
    BlockStore.put = slowly
annotate_file(sys.argv[1], sys.argv[2], model=sys.argv[3], embed=True, reading=ReadOptions(block_cells=8))
"""


def test_killed_in_the_middle_and_run_again(source, tmp_path, random_model):
    def command(out, speed):
        return [sys.executable, "-c", KILLED, str(source), str(out), str(random_model.folder), speed]

    started = subprocess.Popen(command(tmp_path / "out.h5ad", "slow"), stdout=subprocess.PIPE, text=True)
    assert [started.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.close()
    (folder,) = [name for name in os.listdir(tmp_path) if name.startswith(PREFIX)]
    assert {"0000000.npz", "0000001.npz"} <= set(os.listdir(tmp_path / folder))
    finished = (tmp_path / folder / "0000000.npz").stat().st_mtime_ns
    time.sleep(0.05)
    subprocess.run(command(tmp_path / "out.h5ad", "fast"), check=True)
    subprocess.run(command(tmp_path / "whole.h5ad", "fast"), check=True)
    assert same(tmp_path / "out.h5ad", tmp_path / "whole.h5ad")
    assert finished < (tmp_path / "out.h5ad").stat().st_mtime_ns and not (tmp_path / folder).exists()


RANK = """
import sys
import anndata as ad
from scmulan.model.loading import load
from scmulan._dist import inference_ranks
from scmulan.tl._annotate import annotate_cells
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._embed import embed_cells
from scmulan.tl._files import annotate_file
reading = ReadOptions(block_cells=8)
with inference_ranks() as ranks:
    account = annotate_file(sys.argv[1], sys.argv[2], model=sys.argv[3], embed=True, reading=reading)
    assert (account["rank"], account["processes"]) == (ranks.rank, 2) and account["cells"] == 60
    adata = ad.read_h5ad(sys.argv[1])
    annotate_cells(adata, load(sys.argv[3]), reading=reading).add_to(adata)
    embed_cells(adata, load(sys.argv[3]), reading=reading).add_to(adata)
    adata.write_h5ad(f"{sys.argv[2]}.{ranks.rank}.h5ad")
"""


def test_two_processes_share_the_cells(source, tmp_path, random_model):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    annotate_file(source, tmp_path / "whole.h5ad", model=random_model.folder, embed=True)
    (tmp_path / "rank.py").write_text(RANK)
    out = tmp_path / "out.h5ad"
    command = [sys.executable, str(tmp_path / "rank.py"), str(source), str(out), str(random_model.folder)]
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [subprocess.Popen(command, env={**base, "RANK": str(rank), "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    whole = ad.read_h5ad(tmp_path / "whole.h5ad")
    for path in (out, f"{out}.0.h5ad", f"{out}.1.h5ad"):
        found = ad.read_h5ad(path)
        assert (found.obs["scmulan_cell_type"].astype(str) == whole.obs["scmulan_cell_type"].astype(str)).all()
        np.testing.assert_allclose(found.obsm["X_scmulan"], whole.obsm["X_scmulan"], atol=1e-5)


PEAK = """
import re, sys
from pathlib import Path
import torch
from scmulan.tl._blockwise import ReadOptions
from scmulan.tl._files import annotate_file
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
def run(source):
    reading = ReadOptions(block_cells=256)
    annotate_file(source, sys.argv[4], model=sys.argv[1], embed=True, reading=reading, device="cpu", force=True)
for _ in range(2):  # the first leaves holes in memory that the second does not find again
    run(sys.argv[2])
before = peak()
run(sys.argv[3])
print(peak() - before)
"""


def write_large(path, model, n, per_cell=2_000):
    """File of sparse cells whose matrix takes ``8 n per_cell`` bytes: 15 genes of the model, others that it lacks."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(sp.csr_matrix((n, 40_000), dtype=np.float32))
    adata.var_names = [*model.vocabulary.genes[:300], *(f"OTHER{i}" for i in range(39_700))]
    adata.obs_names = [f"cell-{i}" for i in range(n)]
    adata.write_h5ad(path)
    row = np.sort(np.concatenate([rng.permutation(300)[:15], 300 + rng.permutation(39_700)[: per_cell - 15]]))
    with h5py.File(path, "r+") as file:
        matrix = file["X"]
        for name in ("data", "indices", "indptr"):
            del matrix[name]
        matrix.create_dataset("indptr", data=np.arange(n + 1, dtype=np.int64) * per_cell)
        matrix.create_dataset("indices", data=np.tile(row.astype(np.int32), n), chunks=(2**18,))
        matrix.create_dataset("data", data=np.ones(n * per_cell, dtype=np.float32), chunks=(2**18,))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path, random_model):
    """A matrix of 112 MB needs no more than one of 34 MB, of which about as much is looked at to choose the matrix."""
    small = write_large(tmp_path / "small.h5ad", random_model, 2_100)
    large = write_large(tmp_path / "large.h5ad", random_model, 7_000)
    command = [sys.executable, "-c", PEAK, random_model.folder, small, large, tmp_path / "out.h5ad"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 30 * 1024
    found = ad.read_h5ad(tmp_path / "out.h5ad", backed="r")
    assert found.obsm["X_scmulan"].shape == (7_000, 32)
    found.file.close()
