"""Checkpoints in the published layout with the weights that the stored outputs were made from, and seeded networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scmulan.model.network import Mulan, MulanConfig
from scmulan.model.release import import_release

FIXTURES = {"nobias": "parity_nobias.npz", "bias": "parity_bias.npz"}


def release_checkpoint(*, seed, layers, heads, width, bias, vocabulary=2222, levels=10):
    """``{"model_args": …, "model": …}`` from PCG64; the order of draws decides the weights."""
    rng = np.random.Generator(np.random.PCG64(seed))
    state = {}

    def normal(*shape, scale):
        return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))

    def norm(name):
        state[f"{name}.weight"] = 1 + normal(width, scale=0.1)
        if bias:
            state[f"{name}.bias"] = normal(width, scale=0.1)

    def linear(name, fan_out, fan_in):
        state[f"{name}.weight"] = normal(fan_out, fan_in, scale=fan_in**-0.5)
        if bias:
            state[f"{name}.bias"] = normal(fan_out, scale=0.1)

    state["transformer.wte.weight"] = normal(vocabulary, width, scale=0.5)
    state["transformer.wee.weight"] = normal(levels + 1, width, scale=0.5)
    for i in range(layers):
        norm(f"transformer.h.{i}.ln_1")
        linear(f"transformer.h.{i}.attn.c_attn", 3 * width, width)
        linear(f"transformer.h.{i}.attn.c_proj", width, width)
        norm(f"transformer.h.{i}.ln_2")
        linear(f"transformer.h.{i}.mlp.c_fc", 4 * width, width)
        linear(f"transformer.h.{i}.mlp.c_proj", width, 4 * width)
    norm("transformer.ln_f")
    state["lm_head.weight"] = normal(vocabulary, width, scale=0.5)
    state["epx_head.weight"] = normal(vocabulary, width, scale=0.5)
    settings = {
        "block_size": 1550,
        "vocab_size": vocabulary,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "dropout": 0.0,
        "bias": bias,
        "train_mode": "pretrain",
        "expression_level": levels,
        "ele": 1,
    }
    return {"model_args": settings, "model": state}


@pytest.fixture(scope="session")
def make_checkpoint():
    return release_checkpoint


@pytest.fixture
def small_checkpoint():
    """A published checkpoint of one narrow layer, to be changed by the test."""
    return release_checkpoint(seed=3, layers=1, heads=2, width=8, bias=False)


@pytest.fixture(scope="session")
def stored() -> dict[str, Path]:
    folder = Path(__file__).resolve().parents[1] / "fixtures"
    return {name: folder / file for name, file in FIXTURES.items()}


@pytest.fixture(scope="session")
def imported(stored, tmp_path_factory) -> dict[str, Path]:
    """Model folder of each stored fixture, imported from a checkpoint file."""
    folder = tmp_path_factory.mktemp("release")
    folders = {}
    for name, path in stored.items():
        with np.load(path) as fixture:
            config = json.loads(str(fixture["config"]))
        torch.save(release_checkpoint(**config), folder / f"{name}.pt")
        folders[name] = import_release(folder / f"{name}.pt", folder / name)
    return folders


def seeded_network(seed=0, **settings) -> Mulan:
    """Network whose weights come from PCG64, so that its outputs are the same with every torch."""
    network = Mulan(MulanConfig(**{"vocabulary": 30, "layers": 2, "heads": 2, "width": 16, **settings}))
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if name.startswith("blocks") and parameter.ndim == 2 else 0.5
            numbers = rng.standard_normal(tuple(parameter.shape)) * scale
            shift = 1.0 if "norm" in name and name.endswith("weight") else 4.0 if name == "value_bias" else 0.0
            parameter.copy_(torch.from_numpy((numbers + shift).astype(np.float32)))
    return network.eval()


@pytest.fixture(scope="session")
def make_network():
    return seeded_network
