"""Outputs are refused before any work, and written whole or not at all, also on a full disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scmulan._io.outputs import atomic_path, check_output
from scmulan.errors import OutputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_output_that_exists_needs_force(tmp_path):
    path = tmp_path / "out.h5ad"
    check_output(path)
    assert not names(tmp_path)
    path.write_text("old")
    with pytest.raises(OutputError, match="exists already; give --force"):
        check_output(path)
    check_output(path, force=True)
    assert path.read_text() == "old"


def test_a_folder_as_output(tmp_path):
    folder = tmp_path / "model"
    check_output(folder, folder=True)
    folder.mkdir()
    check_output(folder, folder=True)  # empty
    with pytest.raises(OutputError, match="a folder; give the path of a file"):
        check_output(folder, force=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="--force"):
        check_output(folder, folder=True)
    check_output(folder, folder=True, force=True)
    with pytest.raises(OutputError, match="a file; give the path of a folder"):
        check_output(folder / "config.json", folder=True, force=True)


def test_an_output_that_cannot_be_there(tmp_path):
    with pytest.raises(OutputError, match=r"there is no folder .*missing; make it first"):
        check_output(tmp_path / "missing" / "out.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(tmp_path / "file" / "out.csv")
    with pytest.raises(OutputError, match="neither a file nor a folder"):
        check_output(os.devnull, force=True)
    with pytest.raises(OutputError, match=r"ends in \.csv or \.tsv"):
        check_output(tmp_path / "out.xlsx", suffixes=(".csv", ".tsv"))
    check_output(tmp_path / "out.TSV", suffixes=(".csv", ".tsv"))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    # Root may write wherever there is a real disk; /proc takes no files from anybody.
    locked = Path("/proc") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        locked.mkdir(mode=0o500)
    elif not locked.is_dir():
        pytest.skip("needs a folder that even root cannot write to")
    with pytest.raises(OutputError, match="cannot be written to"):
        check_output(locked / "out.h5ad")


def test_the_target_is_replaced_only_when_all_went_well(tmp_path):
    path = tmp_path / "out.tar.gz"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("out.tar.gz")
        assert not temporary.exists()
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == {"out.tar.gz"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, OSError(errno.EIO, "broken disk")])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    path = tmp_path / "out.h5ad"
    path.write_text("old")
    with pytest.raises(error if isinstance(error, type) else OSError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"out.h5ad"}


def test_folders_are_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("")
        raise RuntimeError
    assert names(path) == {"old"}
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("")
    assert names(path) == {"new"}
    assert names(tmp_path) == {"model"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "real.json"
    real.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(real)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path):
    with atomic_path(tmp_path / "out") as temporary:
        temporary.write_text("")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_known_behind_another_error(tmp_path):
    """As libraries wrap the errors of the system."""
    with pytest.raises(OutputError, match="disk full"), atomic_path(tmp_path / "out"):
        raise RuntimeError("the table could not be written") from OSError(errno.EDQUOT, "quota")
    with pytest.raises(RuntimeError, match="row 128"), atomic_path(tmp_path / "out"):
        raise RuntimeError("row 128 of 27 is not there")


def test_what_cannot_be_written_says_so(tmp_path):
    with pytest.raises(OutputError, match=r"out: cannot be written \(No such file"), atomic_path(tmp_path / "out"):
        pass  # nobody wrote anything
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "out"):
        (tmp_path / "other").read_text()  # not about the output


# What each way of writing does when room runs out. Each has a process of its own, as HDF5 is not itself afterwards.
WRITERS = {
    "h5ad": "write_h5ad(big, 'out.h5ad')",
    "h5py": "with atomic_path('out.h5') as p, h5py.File(p, 'w') as f: f['x'] = np.random.random(1_000_000)",
    "copy": "copy_with_results('source.h5ad', 'out.h5ad', obs=big.obs)",
    "grown copy": "copy_with_results('small.h5ad', 'out.h5ad', obsm={'X_e': np.random.random((3, 1_000_000))})",
    "table": "write_table(pd.DataFrame(np.random.random((100_000, 10))), 'out.csv')",
    "json": "write_json(list(range(1_000_000)), 'out.json')",
    "safetensors": "with atomic_path('out.safetensors') as p: save_file({'x': np.random.random(1_000_000)}, p)",
}
SCRIPT = """
import json, os, resource, signal, sys
import anndata as ad, h5py, numpy as np, pandas as pd
from safetensors.numpy import save_file
from scmulan.errors import OutputError
from scmulan._io.outputs import atomic_path
from scmulan._io.adata import copy_with_results, write_h5ad, write_json, write_table

folder, source, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(source)
small = ad.AnnData(np.ones((3, 2), dtype=np.float32))
small.write_h5ad("small.h5ad")
big = ad.AnnData(np.random.random((500, 1000)))
big.obs["scmulan_cell_type"] = "B cell"
big.write_h5ad("source.h5ad")
os.chdir(folder)
for name in ("small.h5ad", "source.h5ad"):
    os.symlink(os.path.join(source, name), name)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = {}
for name, writer in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            exec(writer)
        except OutputError as error:
            print(error, flush=True)
            os._exit(2)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as text:
        lines = text.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[name] = code, lines, sorted(os.listdir())
print(json.dumps(found))
"""


def run_out_of_room(folder: Path, source: Path, limit: int) -> dict[str, tuple[int, list[str], list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(source), str(limit)],
        input=json.dumps(WRITERS),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def one_line_and_nothing_left(found: tuple[int, list[str], list[str]]) -> None:
    code, lines, left = found
    assert len(lines) == 1, lines
    assert "disk full or file too large; nothing was written" in lines[0]
    assert code == 2
    assert left == ["small.h5ad", "source.h5ad"]


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """What the writers do where no file may be larger than 500 kB (``ulimit -f``): another error than a full disk."""
    pytest.importorskip("resource")
    return run_out_of_room(tmp_path_factory.mktemp("limited"), tmp_path_factory.mktemp("source"), limit=500_000)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """What the writers do on a disk of 600 kB, where mounting one is allowed."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a tiny disk needs root")
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk is not allowed here")
    try:
        yield run_out_of_room(disk, tmp_path_factory.mktemp("source"), limit=0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_too_large_for_the_system(limited, writer):
    one_line_and_nothing_left(limited[writer])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(filled, writer):
    one_line_and_nothing_left(filled[writer])
