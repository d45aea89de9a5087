"""From a spec and its files to a folder of shards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from scmulan._io.outputs import lock_file
from scmulan.data.build import build, find_repeats
from scmulan.data.inspect import verify
from scmulan.data.memory import build_store, build_vocabulary, read_studies
from scmulan.data.shards import open_arrays
from scmulan.data.spec import read_corpus_spec
from scmulan.data.store import Corpus
from scmulan.errors import OutputError, VocabularyError
from scmulan.vocab.vocabulary import Family, Vocabulary


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def respec(files, made):
    """Write the spec of the three studies elsewhere, with other settings."""

    def write(path, settings="", shard_cells=40):
        text = made.text.format(settings=settings).replace("shard_cells = 40", f"shard_cells = {shard_cells}")
        path.write_text(f'folder = "{files}"\n{text}')
        return read_corpus_spec(path)

    return write


def test_a_corpus_holds_what_is_read_into_memory(files, corpus_folder):
    corpus = Corpus(corpus_folder)
    studies = read_studies(read_corpus_spec(files / "spec.toml").studies)
    assert corpus.vocabulary == build_vocabulary(studies, 80)
    store = build_store(studies, corpus.vocabulary)
    assert len(corpus) == len(store) == 210 and corpus.studies == store.studies
    for name in ("logged", "study", "measured", "metadata", "lengths"):
        assert np.array_equal(getattr(corpus, name), getattr(store, name)), name
    np.testing.assert_allclose(corpus.total, store.total, rtol=1e-6)
    covered = [study["covered"] * study["cells"] for study in corpus.manifest["studies"]]
    assert sum(covered) / len(corpus) == pytest.approx(store.covered())
    found = corpus.rows(np.arange(210))
    assert np.array_equal(found.indices, store.matrix.indices) and np.array_equal(found.indptr, store.matrix.indptr)
    large = store.matrix.data > 60_000
    whole = np.repeat(store.study == 0, store.lengths)
    assert np.array_equal(found.data[whole & ~large], store.matrix.data[whole & ~large])
    np.testing.assert_allclose(found.data, store.matrix.data, rtol=5e-3)
    assert found.data.dtype == np.float32


def test_a_manifest_accounts_for_cells_genes_and_inputs(files, made, corpus_folder):
    manifest = Corpus(corpus_folder).manifest
    one, two, three = manifest["studies"]
    assert [shard["encoding"] for shard in manifest["shards"]] == [*["counts"] * 3, *["log1p"] * 2, "counts", "amounts"]
    assert [shard["cells"] for shard in manifest["shards"]] == [40, 40, 20, 40, 10, 40, 20]
    assert one["sha256"] == hashlib.sha256((files / "counts.h5ad").read_bytes()).hexdigest()
    assert (one["cells"], one["rounded"], one["donors"]) == (
        100,
        int(made.genes[5] in Vocabulary.load(corpus_folder / "vocabulary.json").genes),
        2,
    )
    assert two["genes"]["unknown"] == {"count": 1, "examples": ["no gene"]}
    assert manifest["donors"] == [
        ["counts", "d1"],
        ["counts", "d2"],
        ["logged", "L"],
        ["amounts", "d1"],
        ["amounts", "d2"],
    ]
    assert two["matrix"]["state"] == "log1p" and 0 < three["covered"] < 1
    assert set(manifest["files"]) == set(hashes(corpus_folder)) - {"manifest.json", "manifest.sha256"}
    assert verify(corpus_folder)["problems"] == []


def test_donors_have_a_code_of_their_group(corpus_folder):
    corpus = Corpus(corpus_folder)
    assert corpus.donor[:22].tolist() == [0] * 7 + [1] * 7 + [-1] * 7 + [0]
    assert set(corpus.donor[100:150]) == {2} and set(corpus.donor[150:]) == {-1, 3, 4}


def test_processes_write_the_same_bytes_as_one(files, corpus_folder, tmp_path):
    build(read_corpus_spec(files / "spec.toml"), tmp_path / "out", jobs=2)
    assert hashes(tmp_path / "out") == hashes(corpus_folder)


def test_shards_do_not_depend_on_blocks(files, corpus_folder, tmp_path):
    build(read_corpus_spec(files / "spec.toml"), tmp_path / "out", block_values=2000)
    assert hashes(tmp_path / "out" / "shards") == hashes(corpus_folder / "shards")


def start(spec, out):
    code = (
        "import sys; from pathlib import Path; from scmulan.data.build import build;"
        "from scmulan.data.spec import read_corpus_spec;"
        "build(read_corpus_spec(Path(sys.argv[1])), sys.argv[2])"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(spec), str(out)])


def wait_for(folder, pattern, number, process):
    while len(list(folder.glob(pattern))) < number:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)


def test_a_build_that_is_killed_goes_on_where_it_was(respec, tmp_path):
    respec(tmp_path / "spec.toml", shard_cells=10)
    whole, out = tmp_path / "whole", tmp_path / "out"
    build(read_corpus_spec(tmp_path / "spec.toml"), whole)
    work = tmp_path / ".out.building"
    kept = {}
    for pattern, number in (("records/genes-*.json", 3), ("records/write-*.json", 4)):
        process = start(tmp_path / "spec.toml", out)
        wait_for(work, pattern, number, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        kept = {path: path.stat().st_mtime_ns for path in (work / "corpus" / "shards").glob("0*")}
    (work / "corpus" / "shards" / ".tmp-0-left.safetensors").write_bytes(b"half")
    assert len(kept) >= 4
    recorded = {path.name for path in (work / "records").glob("write-*")}
    inodes = {path.name: path.stat().st_ino for path in kept if f"write-{path.stem}.json" in recorded}
    build(read_corpus_spec(tmp_path / "spec.toml"), out)
    assert not work.exists()
    assert {name: (out / "shards" / name).stat().st_ino for name in inodes} == inodes  # not written again
    assert hashes(out) == hashes(whole)


def test_two_builds_into_one_folder_are_refused(files, tmp_path):
    (tmp_path / ".out.building").mkdir()
    with lock_file(tmp_path / ".out.building" / "lock", "busy"):
        with pytest.raises(OutputError, match=r"\.out\.building: another process builds this corpus"):
            build(read_corpus_spec(files / "spec.toml"), tmp_path / "out")


def test_a_build_goes_on_only_as_it_was_begun(respec, tmp_path):
    (tmp_path / "words.json").write_text("no JSON")
    with pytest.raises(VocabularyError, match=r"words\.json: not JSON"):
        build(respec(tmp_path / "spec.toml", "vocabulary = 'words.json'"), tmp_path / "out")
    with pytest.raises(VocabularyError, match=r"words\.json: not JSON"):  # nothing was written: the text may change
        build(respec(tmp_path / "spec.toml", "vocabulary = 'words.json'\nunknown = 'add'"), tmp_path / "out")
    other = respec(tmp_path / "other.toml", "duplicates = 'drop'")
    (tmp_path / ".out.building" / "records" / "write-000000.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"other inputs or settings \(vocabulary differs\), and has written cells; give --force"
    ):
        build(other, tmp_path / "out")
    build(other, tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="exists already"):
        build(other, tmp_path / "out")


# -- names and duplicates -------------------------------------------------------------------------------------------


@pytest.fixture
def small(made, tmp_path):
    """Folder with ``words.json``, a vocabulary that lacks genes and cell types of the studies."""
    names = {Family.FINE: ["T cell"], Family.ORGAN: ["Blood", "Lung"]}
    Vocabulary.build(made.genes[:60], names).save(tmp_path / "words.json")
    return tmp_path


def test_names_that_a_vocabulary_lacks_are_dropped_and_counted(respec, small):
    build(respec(small / "spec.toml", "vocabulary = 'words.json'"), small / "out")
    corpus = Corpus(small / "out")
    assert corpus.vocabulary == Vocabulary.load(small / "words.json")
    assert (corpus.tokens(Family.FINE)[:3] >= 0).tolist() == [True, False, False]
    assert [s["unknown_words"] for s in corpus.manifest["studies"]] == [
        {"fine_type": {"B cell": n}} for n in (33, 17, 20)
    ]


def test_names_that_a_vocabulary_lacks_are_added_at_its_end(respec, small):
    build(respec(small / "spec.toml", "vocabulary = 'words.json'\nunknown = 'add'"), small / "out")
    corpus = Corpus(small / "out")
    old = Vocabulary.load(small / "words.json")
    assert corpus.vocabulary.tokens == (*old.tokens, "B cell")
    assert corpus.tokens(Family.FINE)[1] == len(old) and corpus.manifest["studies"][0]["unknown_words"] == {}


def test_names_that_a_vocabulary_lacks_are_refused(respec, small):
    spec = respec(small / "spec.toml", "vocabulary = 'words.json'\nunknown = 'refuse'")
    with pytest.raises(VocabularyError, match=r"counts\.h5ad: fine_type 'B cell' is not in the vocabulary"):
        build(spec, small / "out")
    assert not (small / "out").exists()


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_cells_that_repeat_others_are_found(made, tmp_path, choice):
    x, y = made.counts(30, 5), made.counts(25, 6)
    y[:4] = x[10:14]  # the same cells in a second study
    y[20] = y[19]
    y[21:23] = 0  # nothing in common but being empty
    y[21:23, 0] = 1
    for name, values in (("one", x), ("two", y)):
        made.adata(values).write_h5ad(tmp_path / f"{name}.h5ad")
    text = f'genes = 100\nduplicates = "{choice}"\n[[study]]\nfile = "one.h5ad"\n[[study]]\nfile = "two.h5ad"\n'
    (tmp_path / "spec.toml").write_text(text)
    build(read_corpus_spec(tmp_path / "spec.toml"), tmp_path / "out")
    corpus = Corpus(tmp_path / "out")
    assert corpus.manifest["duplicates"] == {
        "cells": 5,
        "across_studies": 4,
        "within_studies": 1,
        "pairs": [{"studies": ["one", "two"], "cells": 4}, {"studies": ["two", "two"], "cells": 1}],
    }
    kept = np.arange(55) if choice == "keep" else np.setdiff1d(np.arange(55), [30, 31, 32, 33, 50])
    assert len(corpus) == len(kept) and corpus.manifest["cells"] == len(kept)
    genes = [made.genes.index(gene) for gene in corpus.vocabulary.genes]
    assert np.array_equal(corpus.rows(np.arange(len(kept))).toarray(), np.concatenate([x, y])[kept][:, genes])


def test_duplicates_are_found_in_any_number_of_passes(corpus_folder):
    manifest = Corpus(corpus_folder).manifest
    content = np.concatenate([open_arrays(corpus_folder / s["file"])[0]["content"] for s in manifest["shards"]])
    assert len(np.unique(content)) == 210
    shards = [*manifest["shards"][:2], manifest["shards"][0]]  # the first shard's cells once more
    for max_hashes in (1000, 20):
        repeats = find_repeats(corpus_folder, shards, max_hashes)
        assert repeats.later.tolist() == [False] * 80 + [True] * 40 and repeats.pairs == {(0, 0): 40}


# -- bounds and clusters --------------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
from scmulan.data.build import build
from scmulan.data.spec import read_corpus_spec
peaks = []
for name in ("small", "large"):
    build(read_corpus_spec(Path(sys.argv[1]) / f"{name}.toml"), Path(sys.argv[1]) / name, block_values=2**20)
    peaks.append(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
print(peaks[1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_file(made, tmp_path):
    """A file of 128 MB takes hardly more memory than one of 38 MB: neither is ever held."""
    import h5py

    cells, genes = 8000, 2000
    names = Vocabulary.published().genes[:genes]
    block = made.counts(400, 0, genes)
    for name, n in (("small", 2400), ("large", cells)):
        one = made.adata(np.zeros((n, genes), np.float32), names, made.table(n))
        one.X = None
        one.write_h5ad(tmp_path / f"{name}.h5ad")
        with h5py.File(tmp_path / f"{name}.h5ad", "r+") as file:
            x = file.create_dataset("X", (n, genes), "f8", chunks=(400, 100))
            x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for first in range(0, n, 400):
                x[first : first + 400] = block
        (tmp_path / f"{name}.toml").write_text(f'genes = 50\nshard_cells = 3000\n[[study]]\nfile = "{name}.h5ad"\n')
    size = (tmp_path / "large.h5ad").stat().st_size
    assert size >= 128_000_000
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 4
    assert len(Corpus(tmp_path / "large")) == cells


def test_dask_workers_may_be_killed(respec, tmp_path):
    distributed = pytest.importorskip("distributed")
    spec = respec(tmp_path / "spec.toml", shard_cells=14)
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    records = tmp_path / ".out.building" / "records"
    with distributed.LocalCluster(**settings, silence_logs=50) as cluster:
        done = []
        thread = threading.Thread(
            target=lambda: done.append(build(spec, tmp_path / "out", dask=cluster.scheduler_address))
        )
        thread.start()
        while len(list(records.glob("write-*"))) < 2:
            assert thread.is_alive()
            time.sleep(0.005)
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
        thread.join(60)
        assert done
    build(spec, tmp_path / "alone")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["cells"] == 210
