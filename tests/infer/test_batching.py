"""Batches that fit into memory, whatever it takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from scmulan.errors import ScmulanError
from scmulan.infer.batching import TokenBudget, bytes_per_token, free_bytes, is_out_of_memory, suitable_tokens
from scmulan.infer.scoring import score_labels
from scmulan.model.network import MulanConfig

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("not enough memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda e: type(e).__name__)
def test_a_batch_without_memory_is_done_in_halves(error):
    lengths = np.array([5, 9, 2, 7, 8, 3, 9, 1])
    done, tried = [], []

    def work(rows):
        tried.append(len(rows))
        if len(rows) * lengths[rows].max() > 14:
            raise error
        done.extend(rows.tolist())

    budget = TokenBudget(max_tokens=1_000)
    budget.for_each(lengths, work)
    assert sorted(done) == list(range(8))
    assert tried[0] == 8 and budget.max_tokens <= 18
    tried.clear()
    budget.for_each(lengths, work)
    assert max(tried) <= 4  # what was learned is kept


def test_a_single_cell_that_does_not_fit_is_an_error():
    def work(rows):
        raise MemoryError

    with pytest.raises(ScmulanError, match="a cell of 700 words does not fit into memory"):
        TokenBudget(max_tokens=10).for_each(np.array([700]), work)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def work(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        TokenBudget(max_tokens=10).for_each(np.array([3, 3]), work)
    assert not is_out_of_memory(RuntimeError("memory format"))


def test_results_survive_a_network_that_runs_out_of_memory_once(random_model, random_prompts, monkeypatch):
    prompts = random_prompts(random_model, 20)
    expected = score_labels(random_model, prompts)
    network, failed = random_model.network, []
    forward_last = type(network).forward_last

    def short_once(self, entity, *rest):
        if not failed:
            failed.append(entity.shape)
            raise torch.OutOfMemoryError("out of memory")
        return forward_last(self, entity, *rest)

    monkeypatch.setattr(type(network), "forward_last", short_once)
    finished = []
    found = score_labels(random_model, prompts, advance=finished.append)
    assert failed and sum(finished) == 20
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-5)
    assert np.array_equal(found.fine.argmax(1), expected.fine.argmax(1))


def test_the_batch_follows_the_memory_that_is_free(random_model, monkeypatch):
    device = torch.device("cpu")
    assert free_bytes(device) > 2**20
    per_token = bytes_per_token(random_model.config)
    module = "scmulan.infer.batching.free_bytes"
    monkeypatch.setattr(module, lambda device: 2 * 100 * per_token + 1)
    assert suitable_tokens(random_model.network) == 100
    monkeypatch.setattr(module, lambda device: 2**40)
    assert suitable_tokens(random_model.network) > 512
    assert bytes_per_token(MulanConfig()) < bytes_per_token(MulanConfig(width=2240))


PEAK = """
import re, sys, torch
from pathlib import Path
from scmulan.infer.batching import bytes_per_token
from scmulan.model.network import Mulan, MulanConfig
torch.set_num_threads(1)
config = MulanConfig(vocabulary=300, layers=2, heads=4, width=128, set_state=bool(int(sys.argv[1])))
network = Mulan(config).initialise(0).eval()
def passes(rows):
    entity = torch.ones(rows, 256, dtype=torch.int64)
    with torch.inference_mode():
        network.forward_last(entity, entity, torch.full((rows,), 256))
    # (ru_maxrss would begin with the peak of the process that started this one.)
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
small = passes(4)
print((passes(100) - small) / (96 * 256) / bytes_per_token(config))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("set_state", [0, 1])
def test_the_estimate_is_an_upper_bound_within_a_factor_of_two(set_state):
    command = [sys.executable, "-c", PEAK, str(set_state)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.5 < ratio < 1.1
