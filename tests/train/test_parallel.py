"""Several processes do what one does."""

import importlib.util
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from scmulan._dist import RankError, Ranks, training_ranks
from scmulan.model.network import Mulan, MulanConfig
from scmulan.train.batches import BatchConfig, Batches
from scmulan.train.checkpoint import RunFolder
from scmulan.train.config import ObjectiveConfig, OptimizerConfig, RunConfig
from scmulan.train.parallel import whole, whole_network
from scmulan.train.trainer import Trainer, read_log

# Jobs are forked for speed. JAX, if another test has loaded it, warns of that; no job here uses it.
pytestmark = pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")

_spec = importlib.util.spec_from_file_location("jobs", Path(__file__).with_name("jobs.py"))
jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(jobs)

STEPS = 8


def make(
    vocabulary, store, folder, ranks=None, *, steps=STEPS, objective="next_word", average=0.0, validate=None, **run
):
    config = MulanConfig(vocabulary=len(vocabulary), layers=2, heads=2, width=32, set_state=True, value_spread=True)
    return Trainer(
        Mulan(config).initialise(0),
        Batches(store, vocabulary, BatchConfig(cells=9, generate_cells=6, positions=8, pool=4), 3),
        RunFolder(folder),
        objective=ObjectiveConfig(name=objective, value_weight=200.0 if objective == "published" else 1.0),
        optimizer=OptimizerConfig(steps=steps, warmup_steps=3, learning_rate=3e-3, ema_decay=average),
        run=RunConfig(**{"log_every": 1, "validate_every": 1, "checkpoint_minutes": 60.0, **run}),
        validate=validate,
        ranks=ranks,
    )


def losses(trainer):
    return {
        line["step"]: [line[k] for k in line if k.endswith((".entity", ".value"))]
        for line in read_log(trainer.log_path)
        if "validation" not in line
    }


def close(found, expected, rel=1e-5):
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=rel, abs=1e-5), step


def train(trainer):
    trainer.resume()
    done = trainer.train()
    network = whole_network(trainer.model)
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    if trainer.average:
        weights |= {name: whole(weight).clone() for name, weight in trainer.average.tensors().items()}
    return done, trainer.steps_done, trainer.tokens, {k: v.numpy() for k, v in weights.items()}


@pytest.mark.parametrize("objective", ["next_word", "published"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_two_four_and_one_processes_go_on_from_each_other(vocabulary, store, tmp_path, way, objective):
    alone = make(vocabulary, store, tmp_path / "alone", objective=objective, average=0.8)
    assert train(alone)[0]
    folder = tmp_path / "shared"
    for end, world in ((2, 1), (4, 2), (6, 4), (STEPS, 1)):

        def work(ranks, end=end):
            trainer = make(vocabulary, store, folder, ranks, objective=objective, average=0.8, parallel=way)
            trainer.validate = lambda _: os.kill(os.getpid(), signal.SIGTERM) or {} if trainer.steps_done == end else {}
            return train(trainer)

        results = jobs.run_job(world, work, tmp_path) if world > 1 else [work(Ranks())]
        for done, step, words, _ in results:
            assert (done, step) == (end == STEPS, end)
            assert words == results[0][2]
    close(losses(make(vocabulary, store, folder)), losses(alone))
    for name, weight in {**dict(alone.model.named_parameters()), **alone.average.tensors()}.items():
        assert torch.allclose(torch.from_numpy(results[0][3][name]), weight.detach(), rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_step_in_parts_is_the_same_step(vocabulary, store, tmp_path, way):
    """Parts within a process, blocks computed twice, and more processes than some batches have sentences."""
    alone = make(vocabulary, store, tmp_path / "alone", steps=4)
    train(alone)
    parts = make(vocabulary, store, tmp_path / "parts", steps=4, accumulate=3, recompute=True)
    train(parts)
    close(losses(parts), losses(alone))

    def work(ranks):
        trainer = make(vocabulary, store, tmp_path / "both", ranks, steps=4, parallel=way, accumulate=4, recompute=True)
        return train(trainer)

    assert all(result[0] for result in jobs.run_job(2, work, tmp_path))
    close(losses(make(vocabulary, store, tmp_path / "both")), losses(alone))


def test_each_process_of_fully_shard_holds_a_share(vocabulary, store, tmp_path):
    def work(ranks):
        trainer = make(vocabulary, store, tmp_path / "run", ranks, parallel="fsdp")
        held = sum(p.to_local().numel() for p in trainer.model.parameters())
        return held, sum(whole(p).numel() for p in trainer.model.parameters())

    (a, total), (b, _) = jobs.run_job(2, work, tmp_path)
    assert a + b == total and abs(a - b) < 0.1 * total


def test_a_process_that_dies_ends_the_others_with_a_line(vocabulary, store, tmp_path):
    def work(ranks):
        trainer = make(vocabulary, store, tmp_path / "run", ranks)

        def die(_):
            if ranks.rank == 1 and trainer.steps_done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return {}

        trainer.validate = die
        return train(trainer)

    survivor, dead = jobs.run_job(2, work, tmp_path, timeout=10)
    assert dead is None
    assert isinstance(survivor, RankError)
    assert "lost another process of the job" in str(survivor) and "\n" not in str(survivor)


def test_what_the_first_process_is_refused_all_are(tmp_path):
    from scmulan.errors import OutputError

    def work(ranks):
        def refuse():
            raise OutputError(f"only {ranks.rank} tried")

        return ranks.run_on_first(refuse)

    assert [str(error) for error in jobs.run_job(2, work, tmp_path)] == ["only 0 tried"] * 2


def launched(work, restarts, tmp_path):
    """A job of two processes under torchrun's own agent, in a process of its own; its summary if it failed."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def launch():
        config = LaunchConfig(  # as `torchrun --standalone` does
            min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
            max_restarts=restarts, monitor_interval=0.1, start_method="fork",
        )  # fmt: skip
        try:
            elastic_launch(config, work)()
            (tmp_path / "summary").write_text("")
        except Exception as error:  # noqa: BLE001 (torchrun's)
            (tmp_path / "summary").write_text(str(error))

    context = multiprocessing.get_context("fork")
    child = context.Process(target=launch)
    child.start()
    child.join(90)
    assert not child.is_alive()
    return (tmp_path / "summary").read_text()


@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_ends_a_job_with_its_reason_or_continues_it(vocabulary, store, tmp_path, restarts):
    def work():
        torch.set_num_threads(1)
        with training_ranks(10) as ranks:
            trainer = make(vocabulary, store, tmp_path / "run", ranks)
            ranks.run_on_first(lambda: trainer.folder.claim({}))  # the lock of the process that died is in nobody's way
            resumed = trainer.resume()

            def die(_):
                if trainer.steps_done == 3:
                    trainer.save()
                if ranks.rank == 1 and trainer.steps_done == 5 and not resumed:
                    os.kill(os.getpid(), signal.SIGKILL)
                return {}

            trainer.validate = die
            trainer.train()

    started = time.monotonic()
    summary = launched(work, restarts, tmp_path)
    assert time.monotonic() - started < 60
    if restarts == 0:
        # Which of the two torchrun takes for the cause depends on which it hears of first.
        assert "Signal 9 (SIGKILL)" in summary or "lost another process of the job" in summary
        assert RunFolder(tmp_path / "run").last_facts()["step"] == 3
        return
    assert not summary
    alone = make(vocabulary, store, tmp_path / "alone")
    train(alone)
    close(losses(make(vocabulary, store, tmp_path / "run")), losses(alone))


def test_a_checkpoint_that_one_process_cannot_write_leaves_the_one_before(vocabulary, store, tmp_path):
    def work(ranks):
        trainer = make(vocabulary, store, tmp_path / "run", ranks, parallel="fsdp")
        trainer.step()
        trainer.save()
        trainer.step()
        if ranks.rank == 1:  # its files can hold no more, as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        try:
            trainer.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    for error in jobs.run_job(2, work, tmp_path):
        assert isinstance(error, Exception)
        assert "cannot write the checkpoint" in str(error) and "the one before it is still good" in str(error)
    folder = RunFolder(tmp_path / "run")
    assert folder.newest().name == "step-000000001"
    assert folder.last_facts()["processes"] == 2
