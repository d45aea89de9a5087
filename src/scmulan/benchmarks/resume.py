"""Check that interruptions do not change a run: kills, and other numbers of processes, against an undisturbed run.

Everything goes through the command line, as a cluster would do it.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

from scmulan.benchmarks.ceiling import machine
from scmulan.train.trainer import read_log
from scmulan.vocab.genes import GeneTable

RECIPE = """
name = "resume"
[model]
layers = 2
heads = 2
width = 64
[vocabulary]
genes = 500
[batches]
cells = 24
generate_cells = 24
min_cells = 8
tokens = 4096
pool = 8
[optimizer]
steps = {steps}
warmup_steps = 10
[run]
log_every = 1
validate_every = 0
checkpoint_minutes = 0.0          # one after the other, so that kills meet them half written
keep = 2
[data.columns]
fine_type = "label"
organ = "organ"
[[data.study]]
file = "cells.h5ad"
"""
TYPES = ("B cell", "monocyte", "natural killer cell")


def run(*, quick: bool = False) -> dict[str, Any]:
    """Kill and continue, then change the number of processes.

    Returns
    -------
    dict
        ``kills`` (``kill -9``), ``while_writing`` (of them, while a checkpoint was being written), ``bit_identical``
        (weights, moments and losses of the killed run, one process, against the undisturbed one), ``ranks_tried``,
        ``largest_relative_loss_difference`` (over all steps of the runs that changed their number of processes, by
        DDP and by ``fully_shard``).
    """
    kills, steps = (2, 40) if quick else (10, 120)
    ways = ["fsdp"] if quick else ["ddp", "fsdp"]
    numbers = [1, 2] if quick else [1, 2, 4, 1]
    with tempfile.TemporaryDirectory(prefix="scmulan-resume-") as name:
        folder = Path(name)
        make_cells(folder / "cells.h5ad")
        (folder / "recipe.toml").write_text(RECIPE.format(steps=steps), encoding="utf-8")
        whole = Run(folder, "whole")
        whole.finish()
        cut = Run(folder, "cut")
        while_writing = kill_often(cut, kills, random.Random(0))
        same = cut.state().keys() == whole.state().keys() and all(
            torch.equal(tensor, cut.state()[key]) for key, tensor in whole.state().items()
        )
        differences = {}
        for way in ways:
            changed = Run(folder, way, way)
            change_ranks(changed, numbers, steps)
            differences[way] = largest_difference(changed.losses(), whole.losses())
        return {
            "machine": machine(quick=quick),
            "kills": kills,
            "while_writing": while_writing,
            "bit_identical": bool(same and cut.losses() == whole.losses()),
            "steps": steps,
            "ranks_tried": numbers,
            "largest_relative_loss_difference": max(differences.values()),
            "by_way": differences,
        }


class Run:
    """One run folder, and the commands that work on it."""

    def __init__(self, folder: Path, name: str, way: str = "ddp") -> None:
        self.folder = folder
        self.out = folder / name
        self.way = way

    def start(self, ranks: int = 1) -> subprocess.Popen[bytes]:
        """Begin, or continue, by as many processes."""
        launcher = ["-m"]
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command = [sys.executable, *launcher, "scmulan", "pretrain", "recipe.toml", "--out", str(self.out)]
        command += ["--set", f"run.parallel={self.way}"]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | threads,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, ranks: int = 1) -> None:
        """Run to the last step."""
        process = self.start(ranks)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a run that nothing disturbed failed: {errors.decode()[-2000:]}")

    def steps(self) -> int:
        """Count the steps in the log."""
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def beyond(self, steps: int) -> bool:
        """Return whether more steps than these are done."""
        return self.steps() > steps

    def writing(self) -> bool:
        """Return whether a checkpoint is half written."""
        return any((self.out / "checkpoints").glob(".step-*.partial/*"))

    def losses(self) -> dict[int, dict[str, float]]:
        """Return losses and gradient norm of each step."""
        names = ("entity", "value", "gradient")
        return {
            line["step"]: {k: v for k, v in line.items() if k.endswith(names)}
            for line in read_log(self.out / "log.jsonl")
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the last checkpoint of a single process."""
        newest = max((self.out / "checkpoints").glob("step-*"))
        return load_file(newest / "shard-00001.safetensors")


def kill_often(run: Run, kills: int, rng: random.Random) -> int:
    """Kill a run so many times, then let it finish; return how many kills met a half-written checkpoint."""
    met = 0
    for number in range(kills):
        process = run.start()
        before = run.steps()
        if number % 3 < 2 and not _wait(process, partial(run.beyond, before)):
            raise RuntimeError(f"the run ended by itself: {process.stderr.read().decode()[-2000:]}")  # type: ignore[union-attr]
        if number % 3 == 0:
            _wait(process, run.writing)
        elif number % 3 == 1:
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 6.0))  # anywhere, while it starts too
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        met += run.writing()
    run.finish()
    return met


def change_ranks(run: Run, numbers: list[int], steps: int) -> None:
    """Let each number of processes do a part of the steps, ended by SIGTERM; the last one finishes."""
    for i, number in enumerate(numbers[:-1], start=1):
        process = run.start(number)
        goal = i * steps // (len(numbers) + 1)
        if not _wait(process, partial(run.beyond, goal)):
            raise RuntimeError(f"the run ended by itself: {process.stderr.read().decode()[-2000:]}")  # type: ignore[union-attr]
        process.terminate()
        process.communicate()
    run.finish(numbers[-1])


def _wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> bool:
    """Wait for something to become true; False if the process ends before."""
    while process.poll() is None:
        if until():
            return True
        time.sleep(0.002)
    return False


def largest_difference(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> float:
    """Return the largest relative difference of a loss over all steps; infinite if steps or tasks are not the same."""
    if found.keys() != expected.keys() or any(found[s].keys() != expected[s].keys() for s in expected):
        return float("inf")
    return max(
        abs(found[s][k] - v) / abs(v) for s, losses in expected.items() for k, v in losses.items() if k != "gradient"
    )


def make_cells(path: Path, cells: int = 300, genes: int = 600) -> None:
    """Write cells of three types whose genes differ."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, len(TYPES), cells)
    mean = np.where(np.arange(genes) % len(TYPES) == kind[:, None], 1.5, 0.15)
    obs = pd.DataFrame(
        {"label": [TYPES[k] for k in kind], "organ": rng.choice(["Blood", "Lung"], cells)},
        index=[f"cell {i}" for i in range(cells)],
    )
    var = pd.DataFrame(index=GeneTable.load().symbols[:genes])
    ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs, var=var).write_h5ad(path)
