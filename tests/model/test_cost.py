"""Costs against hand calculation and against networks that are counted."""

import pytest
import torch

from scmulan.model import cost
from scmulan.model.network import PUBLISHED, Mulan, MulanConfig

SHAPES = [
    MulanConfig(),
    MulanConfig(vocabulary=100, layers=3, heads=2, width=48, bias=True),
    MulanConfig(vocabulary=77, layers=2, heads=4, width=64, levels=7, set_state=True, value_spread=True),
    MulanConfig(vocabulary=77, layers=1, heads=4, width=64, word_bias=True, bounded_genes=True),
    MulanConfig(vocabulary=77, layers=1, heads=1, width=8, bias=True, set_state=True),
]


@pytest.mark.parametrize("config", SHAPES)
def test_parameters_are_those_of_the_network(config):
    with torch.device("meta"):
        assert cost.count_parameters(config) == sum(p.numel() for p in Mulan(config).parameters())


def test_published_shape():
    assert cost.count_parameters(PUBLISHED) == 368_800_320
    assert cost.weight_bytes(PUBLISHED) == 1_475_201_280
    assert cost.weight_bytes(PUBLISHED, "bf16") == 737_600_640
    assert cost.kv_bytes_per_token(PUBLISHED, "bf16") == 107_520  # 2 × 24 layers × 1120 × 2 bytes
    # 24 × 12 × 1120² multiply-adds in the blocks, 2 × 2222 × 1120 in the heads
    assert cost.forward_flops_per_token(PUBLISHED) == 2 * (361_267_200 + 4_977_280)
    assert cost.batch_flops(PUBLISHED, 1000, 10, 300) == 3 * 10 * cost.sentence_flops(PUBLISHED, 100, heads_at=30)
    # attention: q·k and weights·v, each 1120 multiply-adds per layer and token attended to
    per_token = cost.forward_flops_per_token(PUBLISHED, context=1000, heads=False)
    assert per_token == 2 * (361_267_200 + 24 * 2 * 1120 * 1000)


def test_cache_size_is_what_the_cache_takes():
    config = SHAPES[1]
    cache = Mulan(config).new_cache(1, 10)
    taken = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values))
    assert taken == cache.capacity * cost.kv_bytes_per_token(config, "fp32")


@pytest.mark.parametrize("config", SHAPES[1:])
def test_sentence_flops_are_those_that_torch_counts(config):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network, n_tokens = Mulan(config), 12
    entity = torch.zeros(1, n_tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        hidden = network(entity, entity)[:, -1]
        network.entity_logits(hidden), network.value_mean(hidden)
    # torch's dense attention does the masked half as well
    masked = config.layers * 4 * config.width * n_tokens * (n_tokens - 1) / 2
    assert counter.get_total_flops() == cost.sentence_flops(config, n_tokens) + masked
