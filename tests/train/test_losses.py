"""The chunked losses against their definitions, written out word by word in double precision."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.losses import Targets, objective_loss

V, B, W, END = 17, 5, 8, 0
CHUNKS = [1, 3, 7, 512]


def double_network(spread, seed=0, vocabulary=V, bounded=False):
    config = MulanConfig(
        vocabulary=vocabulary, layers=1, heads=2, width=W,
        set_state=True, value_spread=spread, word_bias=bounded, bounded_genes=bounded,
    )  # fmt: skip
    network = Mulan(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        if network.value_bias is not None:
            network.value_bias += 5.0
    return network


def random_targets(seed=0, *, allowed=False, satisfies=False):
    """Sentences of one to eight target words and the end; words 1…12 are genes, 13…16 labels without value."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.full((B, V), -1, dtype=torch.int16)
    level = torch.zeros((B, V), dtype=torch.uint8)
    row, said = [], []
    for b in range(B):
        words = (torch.randperm(V - 1, generator=generator) + 1)[: 2 * b + 1]
        for at, word in enumerate([*words.tolist(), END]):
            place[b, word] = at
            level[b, word] = int(torch.randint(1, 11, (), generator=generator)) if 1 <= word <= 12 else 0
        row += [b] * (len(words) + 1)
        said += range(len(words) + 1)
    keep = torch.randperm(len(row), generator=generator)[:19]
    relation = torch.eye(V, dtype=torch.bool)
    relation[13, 14] = relation[13, 15] = relation[14, 15] = True
    relation[16, 3] = True
    sayable = torch.rand((B, V), generator=generator) < 0.6
    return Targets(
        row=torch.tensor(row)[keep],
        index=torch.tensor(said)[keep],
        weight=torch.rand(19, generator=generator, dtype=torch.float64),
        order=place,
        level=level,
        end=END,
        allowed=(sayable | (place >= 0)) if allowed else None,
        satisfies=relation if satisfies else None,
        labelled=torch.tensor([True, False, True, True, False]) if satisfies else None,  # the second and fifth: cells
    )


def left_to_say(targets, n):
    """Target words of position n that are not said yet, the end word included."""
    row, said = int(targets.row[n]), int(targets.index[n])
    return [v for v in range(V) if int(targets.order[row, v]) >= said]


def dense_published(network, hidden, targets):
    logits, means = network.entity_logits(hidden), network.value_mean(hidden)
    multi_hot = torch.zeros_like(logits)
    for n in range(len(hidden)):
        multi_hot[n, left_to_say(targets, n)] = 1.0
    bce = F.binary_cross_entropy_with_logits(logits, multi_hot, reduction="none").mean(1)
    errors = [
        (means[n, v] - float(targets.level[targets.row[n], v])) ** 2
        for n in range(len(hidden))
        for v in left_to_say(targets, n)
    ]
    return (V * bce * targets.weight).sum(), torch.stack(errors).mean()


def dense_next_word(network, hidden, targets):
    logits, means = network.entity_logits(hidden), network.value_mean(hidden)
    entity, value = hidden.new_zeros(()), hidden.new_zeros(())
    for n in range(len(hidden)):
        row, said = int(targets.row[n]), int(targets.index[n])
        left = left_to_say(targets, n)
        if left != [END]:
            left.remove(END)
        sayable = [
            v
            for v in range(V)
            if not 0 <= int(targets.order[row, v]) < said and (targets.allowed is None or targets.allowed[row, v])
        ]
        p = next_word_probabilities(network, logits[n], sayable, targets.labelled is None or not targets.labelled[row])
        for v in left:
            right = [v]
            if targets.satisfies is not None and targets.labelled[row]:
                right = [u for u in sayable if targets.satisfies[v, u]]
            entity = entity - targets.weight[n] / len(left) * torch.stack([p[u] for u in right]).sum().log()
            bin_ = int(targets.level[row, v])
            if bin_ > 0 and network.log_scale is None:
                value = value + targets.weight[n] / len(left) * (means[n, v] - bin_) ** 2
            elif bin_ > 0:
                value = value - targets.weight[n] / len(left) * bin_log_probability(network, means[n, v], v, bin_)
    return entity, value


def next_word_probabilities(network, logits, sayable, of_a_cell):
    """Share of each word's weight: exp(z), or σ(z) of genes where a network bounds them."""
    bounded = network.config.bounded_genes and of_a_cell
    weights = {v: logits[v].sigmoid() if bounded and v != END else logits[v].exp() for v in sayable}
    return {v: w / sum(weights.values()) for v, w in weights.items()}


def bin_log_probability(network, mean, word, level):
    """Mass of a logistic distribution between level ± ½, the tails in bins 1 and 10."""
    scale = network.log_scale[word].exp()
    upper = 1.0 if level == 10 else torch.sigmoid((level + 0.5 - mean) / scale)
    lower = 0.0 if level == 1 else torch.sigmoid((level - 0.5 - mean) / scale)
    return torch.log(upper - lower)


def gradients(total, network, hidden):
    wanted = [p for n, p in network.named_parameters() if n.startswith(("entity", "value", "log_scale"))]
    found = torch.autograd.grad(total, [hidden, *wanted], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def assert_same(network, targets, name, value_weight, chunk):
    hidden = torch.randn(
        len(targets.row), W, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    dense = {"published": dense_published, "next_word": dense_next_word}[name]
    expected = dense(network, hidden, targets)
    got = objective_loss(network, hidden, targets, objective=name, value_weight=value_weight, chunk=chunk)
    for a, b in zip(got, expected, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-12)
    ours = gradients(got[0] + value_weight * got[1], network, hidden)
    theirs = gradients(expected[0] + value_weight * expected[1], network, hidden)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(g.abs().sum() > 0 for g in ours)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("spread", [False, True])
def test_published_loss_is_its_definition(chunk, spread):
    network = double_network(spread)
    if spread:  # the published value loss knows no scale: its gradient must not exist
        network.log_scale.requires_grad_(False)
        network.log_scale = None
    assert_same(network, random_targets(), "published", 200.0, chunk)


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("satisfies", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_next_word_loss_is_its_definition(chunk, spread, allowed, satisfies, bounded):
    network = double_network(spread, bounded=bounded)
    assert_same(network, random_targets(1, allowed=allowed, satisfies=satisfies), "next_word", 0.7, chunk)


def test_the_end_is_wanted_only_when_nothing_else_is_left():
    network = double_network(False)
    targets = random_targets(2)
    # With a head that is the identity the logits are the hidden states: the gradient is softmax − wanted.
    network.entity_head.weight = torch.nn.Parameter(torch.eye(V, dtype=torch.float64))
    z = torch.zeros(len(targets.row), V, dtype=torch.float64, requires_grad=True)
    objective_loss(network, z, targets, objective="next_word", value_weight=0.0)[0].backward()
    last = [n for n in range(len(z)) if left_to_say(targets, n) == [END]]
    assert last and len(last) < len(z)
    assert torch.allclose(z.grad.sum(1), torch.zeros(len(z), dtype=torch.float64))
    wants_end = z.grad[:, END] < 0
    assert wants_end.nonzero()[:, 0].tolist() == last


@pytest.mark.parametrize("name", ["published", "next_word"])
def test_memory_does_not_grow_with_positions_times_words(name):
    """The largest tensor that any operation makes, forward and backward."""
    network = double_network(True)
    targets = random_targets(3, allowed=name == "next_word")

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.most = max(self.most, tensor.numel())
            return out

    def most(chunk, repeat=40):
        hidden = torch.randn(len(targets.row) * repeat, W, dtype=torch.float64, requires_grad=True)
        many = replace(
            targets,
            row=targets.row.repeat(repeat),
            index=targets.index.repeat(repeat),
            weight=targets.weight.repeat(repeat),
        )
        with Largest() as largest:
            e, v = objective_loss(network, hidden, many, objective=name, value_weight=1.0, chunk=chunk)
            (e + v).backward()
        return largest.most, len(hidden)

    dense, positions = most(10**6)
    assert dense >= positions * V  # the measure sees a table of positions × words where there is one
    assert most(8)[0] <= positions * W


@pytest.mark.parametrize("name", ["published", "next_word"])
def test_under_autocast_the_losses_are_those_of_bf16_heads(name):
    network = double_network(True, bounded=name == "next_word").float()
    targets = replace(random_targets(1), weight=random_targets(1).weight.float())
    hidden = torch.randn(len(targets.row), W, requires_grad=True)
    found = {}
    for bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            e, v = objective_loss(network, hidden, targets, objective=name, value_weight=1.0)
        found[bf16] = [e, v, *torch.autograd.grad(e + v, [hidden, network.entity_head.weight])]
    for a, b in zip(found[True], found[False], strict=True):
        assert a.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("bounded", [False, True])
def test_expected_next_word_loss_is_the_likelihood_averaged_over_all_orders(bounded):
    genes, end, ask = [1, 2, 3], 0, 5
    network = double_network(False, seed=4, vocabulary=6, bounded=bounded)

    def sentence(order):
        """Hidden states after the prompt word and after each word, and what is asked there."""
        entity = torch.tensor([[ask, *order]])
        value = torch.tensor([[0, *(w + 1 for w in order)]])
        place = torch.full((1, 6), -1, dtype=torch.int16)
        for at, word in enumerate([*order, end]):
            place[0, word] = at
        number = len(order) + 1
        return network(entity, value)[0], Targets(
            row=torch.zeros(number, dtype=torch.int64),
            index=torch.arange(number),
            weight=torch.ones(number, dtype=torch.float64),
            order=place,
            level=torch.zeros((1, 6), dtype=torch.uint8),
            end=end,
            allowed=sayable[None],
        )

    def log_probability(order):
        """Of saying these words in this order and then the end, each word at most once."""
        hidden, total = sentence(order)[0], 0.0
        for t, word in enumerate([*order, end]):
            free = [w for w in range(6) if sayable[w] and w not in order[:t]]
            total += math.log(next_word_probabilities(network, network.entity_logits(hidden[t]), free, True)[word])
        return total

    sayable = torch.tensor([True, True, True, True, True, False])
    with torch.no_grad():
        orders = list(itertools.permutations(genes))
        losses = [
            objective_loss(network, *sentence(o), objective="next_word", value_weight=0.0)[0].item() for o in orders
        ]
        assert sum(losses) / len(orders) == pytest.approx(-sum(map(log_probability, orders)) / len(orders), rel=1e-12)
        cells = [o for n in range(5) for chosen in itertools.combinations(range(1, 5), n)
                 for o in itertools.permutations(chosen)]  # fmt: skip
        assert len(cells) == 65
        assert math.fsum(math.exp(log_probability(o)) for o in cells) == pytest.approx(1.0, rel=1e-12)
