"""The loop: it learns, and what interrupts it changes nothing."""

import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from scmulan.errors import RecipeError
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.checkpoint import RunFolder, read_tensors
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.losses import value_pairs
from scmulan.train.trainer import Trainer, batch_loss, learning_rate, make_optimizer, read_log
from scmulan.vocab.tasks import TASKS

STEPS = 12


class Stopper:
    """Sends this process a signal when a step is reached."""

    def __init__(self, step, number):
        self.step, self.number, self.trainer = step, number, None

    def __call__(self, model):
        if self.trainer.steps_done == self.step:
            os.kill(os.getpid(), self.number)
        return {"accuracy": 0.5}


def trainer(vocabulary, store, folder, *, validate=None, seed=0, dropout=0.0, **settings):
    config = MulanConfig(
        vocabulary=len(vocabulary), layers=1, heads=2, width=32, set_state=True, value_spread=True, dropout=dropout
    )
    batches = Batches(store, vocabulary, BatchConfig(cells=8, positions=8, pool=4), seed)
    made = Trainer(
        Mulan(config).initialise(seed),
        batches,
        RunFolder(folder),
        objective=ObjectiveConfig(name=settings.pop("objective", "next_word")),
        optimizer=OptimizerConfig(**{"steps": STEPS, "warmup_steps": 3, "learning_rate": 3e-3, **settings}),
        run=RunConfig(log_every=1, validate_every=1, checkpoint_minutes=60.0),
        validate=validate,
    )
    if isinstance(validate, Stopper):
        validate.trainer = made
    return made


def weights(made):
    return made.model.state_dict()


def curve(made):
    """The log without what depends on the machine's speed."""
    lines = [line for line in read_log(made.log_path) if "validation" not in line]
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in lines]


@pytest.mark.parametrize("objective", ["next_word", "published"])
def test_a_small_run_learns_all_three_tasks(vocabulary, store, tmp_path, objective):
    made = trainer(vocabulary, store, tmp_path, steps=120, warmup_steps=10, objective=objective)
    all_positions = Batches(store, vocabulary, BatchConfig(positions=0, panel=0.0, downsample=0.0), 0)

    def losses():
        found = {}
        for name, task in TASKS.items():
            cells = np.flatnonzero(all_positions.weights[name])
            with torch.no_grad():
                batch = all_positions.make(task, cells, np.random.default_rng(0))
                found[name] = batch_loss(made.model, batch, made.objective)[0].item()
        return found

    before = losses()
    assert made.train()
    after = losses()
    assert after["annotate"] < 0.7 * before["annotate"]
    assert after["locate"] < 0.7 * before["locate"]
    assert after["generate"] < (0.7 if objective == "published" else 0.95) * before["generate"]
    assert [line["step"] for line in read_log(made.log_path)] == list(range(1, 121))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_run_ends_with_the_same_weights(vocabulary, store, tmp_path, number, dropout):
    average = 0.7 if dropout else 0.0
    whole = trainer(vocabulary, store, tmp_path / "whole", dropout=dropout, ema_decay=average)
    assert whole.train()

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stopped = trainer(
        vocabulary, store, tmp_path / "cut", dropout=dropout, ema_decay=average, validate=Stopper(5, number)
    )
    assert not stopped.train()
    assert stopped.steps_done == 5
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

    torch.rand(7)  # what other code draws in between must not matter
    again = trainer(vocabulary, store, tmp_path / "cut", dropout=dropout, ema_decay=average)
    assert again.resume()
    assert again.steps_done == 5
    assert again.train()
    state = again.tensors()
    assert state.keys() == whole.tensors().keys() and any(n.startswith("average.") for n in state) == bool(average)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, state[name]), name
    assert again.tokens == whole.tokens
    assert curve(again) == curve(whole)


def test_the_average_is_what_is_validated_and_training_goes_on_from_the_weights(vocabulary, store, tmp_path):
    def keep(seen):
        return lambda model: seen.append({n: w.clone() for n, w in model.state_dict().items()}) or {}

    averages, each = [], []
    made = trainer(vocabulary, store, tmp_path / "a", ema_decay=0.6, validate=keep(averages))
    plain = trainer(vocabulary, store, tmp_path / "b", validate=keep(each))
    expected = {name: weight.clone() for name, weight in weights(plain).items()}
    assert made.train() and plain.train() and len(averages) == len(each) == STEPS
    for step, now in enumerate(each, 1):
        keep_share = min(0.6, step / (step + 9))
        expected = {name: w * keep_share + now[name] * (1 - keep_share) for name, w in expected.items()}
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(made)[name]), name
        assert torch.equal(averages[-1][name], made.average.weights[name]), name
        assert torch.allclose(averages[-1][name], expected[name], atol=1e-6), name
    assert not all(torch.equal(averages[-1][name], weight) for name, weight in weights(made).items())


def test_a_run_that_is_not_resumed_differs(vocabulary, store, tmp_path):
    """The comparison above can fail: another seed, and a resumed model without its optimiser's moments."""
    whole = trainer(vocabulary, store, tmp_path / "a")
    whole.train()
    other = trainer(vocabulary, store, tmp_path / "b", seed=1)
    other.train()
    assert not torch.equal(weights(whole)["word.weight"], weights(other)["word.weight"])


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(vocabulary, store, tmp_path):
    whole = trainer(vocabulary, store, tmp_path / "whole")
    whole.train()
    made = trainer(vocabulary, store, tmp_path / "cut")
    for _ in range(3):
        made.step()
    made.save()
    made.step()
    made.save()
    newest = max((tmp_path / "cut" / "checkpoints").glob("step-*/*.safetensors"))
    assert newest.parent.name == "step-000000004"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = trainer(vocabulary, store, tmp_path / "cut")
    assert again.resume()
    assert again.steps_done == 3
    again.train()
    assert all(torch.equal(w, weights(again)[n]) for n, w in weights(whole).items())


def test_lines_after_the_checkpoint_are_cut(vocabulary, store, tmp_path):
    stopped = trainer(vocabulary, store, tmp_path, validate=Stopper(5, signal.SIGTERM))
    stopped.train()
    with open(stopped.log_path, "a") as log:
        log.write(json.dumps({"step": 6, "annotate.entity": 1.0}) + "\n")
        log.write('{"step": 7, "annot')  # killed while it was written
    again = trainer(vocabulary, store, tmp_path)
    again.resume()
    assert [line["step"] for line in read_log(again.log_path)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    again.train()
    steps = [line["step"] for line in read_log(again.log_path) if "validation" not in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_fresh_run_does_not_continue_an_old_log(vocabulary, store, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n')
    made = trainer(vocabulary, store, tmp_path)
    assert not made.resume()
    assert not made.log_path.exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_with_a_reason_and_what_led_to_it(vocabulary, store, tmp_path, what):
    made = trainer(vocabulary, store, tmp_path)
    made.step()
    made.save()
    with torch.no_grad():
        if what == "loss":
            made.model.norm.weight[3] = float("nan")
        else:
            made.model.level.weight.register_hook(lambda g: g * float("inf"))
    before = {name: weight.clone() for name, weight in weights(made).items()}
    with pytest.raises(RecipeError, match=rf"the {what} is (nan|inf) .*at step 1 .*{tmp_path}/diverged.*rate") as error:
        made.train()
    assert "\n" not in str(error.value)
    report = json.loads((tmp_path / "diverged" / "report.json").read_text())
    assert report["step"] == 1
    assert report["not_finite"]["weight" if what == "loss" else "gradient"]
    sentences = safetensors.numpy.load_file(tmp_path / "diverged" / "sentences-0.safetensors")
    assert (sentences["0.entity"] == made.batches.batch(1).entity.numpy()).all()
    kept = {f"model.{name}": torch.zeros_like(weight) for name, weight in before.items()}
    read_tensors(Path(report["checkpoint"]), kept)
    assert all(torch.equal(kept[f"model.{n}"].nan_to_num(7.0), w.nan_to_num(7.0)) for n, w in before.items())
    again = trainer(vocabulary, store, tmp_path)
    assert again.resume() and again.steps_done == 1
    assert all(torch.isfinite(w).all() for w in weights(again).values())


def test_parts_of_a_batch_add_up_to_it(vocabulary, store, network):
    batches = Batches(store, vocabulary, BatchConfig(cells=5, generate_cells=3, positions=8, pool=4), 0)
    for step in range(6):
        whole = batches.batch(step)
        for parts in (2, 3, 7):
            shares = [whole.micro_batch(i, parts) for i in range(parts)]
            for name in ("next_word", "published"):
                objective = ObjectiveConfig(name=name, value_weight=2.0)
                pairs = sum(value_pairs(part.targets) for part in shares)
                assert pairs == value_pairs(whole.targets)
                expected = batch_loss(network, whole, objective)
                found = [batch_loss(network, part, objective, pairs) for part in shares]
                for i in range(2):
                    total = sum(losses[i].item() for losses in found)
                    assert total == pytest.approx(expected[i].item(), rel=1e-5, abs=1e-6)


def test_what_tensorboard_shows_is_what_the_log_says(vocabulary, store, tmp_path):
    pytest.importorskip("tensorboard")
    made = trainer(vocabulary, store, tmp_path, steps=3)
    made.run_config = replace(made.run_config, tensorboard=True)
    made.validate = lambda _: {"accuracy": 0.25}
    made.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [line for line in read_log(made.log_path) if "validation" not in line]
    assert [e.value for e in events.Scalars("gradient")] == pytest.approx([line["gradient"] for line in lines])
    assert [e.step for e in events.Scalars("validation/accuracy")] == [1, 2, 3]


def test_the_rate_warms_up_and_falls_as_a_cosine():
    config = OptimizerConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_only_matrices_decay(network):
    groups = make_optimizer(network, OptimizerConfig(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        plain = "norm" in name or "gain" in name or name in ("log_scale", "value_bias")
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name


def test_gradients_are_clipped(vocabulary, store, tmp_path):
    sizes = []
    for clip in (1e-6, 1.0):
        made = trainer(vocabulary, store, tmp_path / str(clip), grad_clip=clip)
        metrics = made.step()
        norm = torch.stack([p.grad.norm() for p in made.model.parameters() if p.grad is not None]).norm().item()
        assert norm <= clip * 1.001
        sizes.append(metrics.grad_norm)
    assert sizes[0] == sizes[1] > 1e-6  # the log shows the norm before clipping
