"""Which sentences a step's batch has: tables alone decide it, so every rank can for itself."""

import numpy as np

from scmulan.corpus.cells import Cells
from scmulan.corpus.order import Balance, Windows
from scmulan.language.tasks import TASKS, Task
from scmulan.language.vocabulary import Family
from scmulan.training.draw import BatchConfig, Drawing, Drawn
from scmulan.training.rows import uniform_of

_POOL, _DRAWN, _WINDOW, _TASK, _SIZE = range(5)  # what a random stream is for


def most_cells(config: BatchConfig, task: Task) -> int:
    """Most cells of a batch of a task."""
    return config.cells if Family.GENE in task.given else config.generate_cells


class WeightedPlan:
    """Batches of cells drawn with weights: in a pool of many, sentences of one length share a batch.

    Of each task, as many sentences are drawn as a whole pool of its batches needs, sorted, and divided into batches;
    a step's is one of those at random, cut to the words that it has room for.
    """

    steps = 0

    def __init__(self, cells: Cells, serves: np.ndarray, drawing: Drawing, config: BatchConfig, seed: int) -> None:
        powers = {p: getattr(config, p) for p in ("study_power", "label_power", "organ_power")}
        self.balance = Balance(cells, serves, len(config.tasks), **powers)
        self.drawing = drawing
        self.config = config
        self.seed = seed
        self._kept: tuple[int, list[Drawn]] | None = None

    def batch(self, step: int) -> Drawn:
        """Sentences of a step."""
        pool, place = divmod(step, self.config.pool)
        kept = self._kept  # a local name: another thread may put another pool in its place
        if kept is None or kept[0] != pool:
            kept = self._kept = pool, self._pool(pool)
        return kept[1][place]

    def _pool(self, pool: int) -> list[Drawn]:
        config = self.config
        shares = np.array(list(config.tasks.values()))
        rng = np.random.default_rng([self.seed, _POOL, pool])
        tasks = rng.choice(len(shares), size=config.pool, p=shares / shares.sum())
        out: dict[int, Drawn] = {}
        for k, name in enumerate(config.tasks):
            places = np.flatnonzero(tasks == k)
            if not len(places):
                continue
            rng = np.random.default_rng([self.seed, _DRAWN, pool, k])
            most = most_cells(config, TASKS[name])
            drawn = self.drawing.draw(TASKS[name], self.balance.draw(k, config.pool * most, rng), rng)
            order = np.argsort(drawn.words, kind="stable").reshape(config.pool, most)
            for place, group in zip(places, rng.permutation(config.pool), strict=False):
                room = config.words // int(drawn.words[order[group]].max())
                out[int(place)] = drawn.take(rng.permutation(order[group])[: max(config.least_cells, room)])
        return [out[place] for place in range(config.pool)]


class EpochPlan:
    """Batches in which every cell comes once per epoch, for one of the tasks that it can serve.

    A window of cells always makes the same number of batches, so that a step's window is known at once; how many of
    each task follows from its cells.
    """

    def __init__(self, serves: np.ndarray, drawing: Drawing, config: BatchConfig, seed: int) -> None:
        self.serves = serves
        # Cells without words, or of which no task can ask anything, are left out.
        self.usable = None if serves.all() else np.flatnonzero(serves)
        number = len(serves) if self.usable is None else len(self.usable)
        self.windows = Windows(number, seed, block=config.block, window=config.window)
        self.drawing = drawing
        self.config = config
        self.seed = seed
        cost = self._mean_cost(number)
        self._batches = [self._number(self.windows.cells_of(w), cost) for w in (0, len(self.windows) - 1)]
        self.steps = self._batches[0] * (len(self.windows) - 1) + self._batches[1]
        self._kept: tuple[tuple[int, int], list[Drawn]] | None = None

    def _number(self, cells: int, cost: float) -> int:
        """Batches of a window: what its cells need, but no more than leave each task's ``least_cells``."""
        tasks, least = len(self.config.tasks), self.config.least_cells
        room = (cells - tasks * (least - 1)) // least
        return min(cells, max(tasks, min(room, int(np.ceil(1.02 * cells * cost)))))

    def _mean_cost(self, number: int) -> float:
        """Mean share of a batch that a cell takes, of up to 16,384 cells."""
        cells = self._cells(np.unique(np.linspace(0, number - 1, min(number, 16_384)).astype(np.int64)))
        drawn = self._draw(cells, 0, np.random.default_rng([self.seed, _SIZE]))
        return float(sum(self._costs(d).sum() for d in drawn) / number) * number / len(cells)

    def _cells(self, places: np.ndarray) -> np.ndarray:
        return places if self.usable is None else self.usable[places]

    def _costs(self, drawn: Drawn) -> np.ndarray:
        most = most_cells(self.config, drawn.task)
        return np.clip(drawn.words / self.config.words, 1 / most, max(1 / most, 1 / self.config.least_cells))

    def _draw(self, cells: np.ndarray, epoch: int, rng: np.random.Generator) -> list[Drawn]:
        """Sentences of cells, each for one task, task by task."""
        shares = np.array(list(self.config.tasks.values()))
        can = self.serves[cells][:, None] >> np.arange(len(shares), dtype=np.uint8) & 1
        cumulated = np.cumsum(can * shares, axis=1)
        key = np.random.SeedSequence([self.seed, _TASK, epoch]).generate_state(1, np.uint64)[0]
        chosen = (uniform_of(key, cells)[:, None] * cumulated[:, -1:] >= cumulated).sum(1)
        for k, number in enumerate(np.bincount(chosen, minlength=len(shares))):
            if 0 < number < self.config.least_cells:  # too few for a batch: another task, where they can serve one
                few = np.flatnonzero(chosen == k)
                others = can[few] * np.where(np.arange(len(shares)) == k, 0.0, shares)
                chosen[few] = np.where(others.any(1), others.argmax(1), k)
        tasks = [TASKS[name] for name in self.config.tasks]
        return [self.drawing.draw(task, cells[chosen == k], rng) for k, task in enumerate(tasks) if (chosen == k).any()]

    def batch(self, step: int) -> Drawn:
        """Sentences of a step."""
        epoch, step = divmod(step, self.steps)
        window = min(step // self._batches[0], len(self.windows) - 1)
        kept = self._kept  # a local name, as above
        if kept is None or kept[0] != (epoch, window):
            kept = self._kept = (epoch, window), self._window(epoch, window)
        return kept[1][step - window * self._batches[0]]

    def _window(self, epoch: int, window: int) -> list[Drawn]:
        rng = np.random.default_rng([self.seed, _WINDOW, epoch, window])
        drawn = self._draw(self._cells(self.windows.read(epoch, window)), epoch, rng)
        number = self._batches[0 if window < len(self.windows) - 1 else 1]
        costs = [self._costs(d) for d in drawn]
        out = []
        for d, cost, parts in zip(drawn, costs, _apportion(number, costs, self.config.least_cells), strict=True):
            order = np.argsort(d.words, kind="stable")
            done = np.cumsum(cost[order]) - cost[order] / 2
            cuts = np.searchsorted(done, np.arange(1, parts) * (done[-1] + cost[order[-1]] / 2) / parts)
            if (np.diff(cuts, prepend=0, append=len(order)) == 0).any():  # a few cells, each as large as a batch
                cuts = np.arange(1, parts) * len(order) // parts
            out += [d.take(rng.permutation(rows)) for rows in np.split(order, cuts)]
        return [out[i] for i in rng.permutation(number)]


def _apportion(number: int, costs: list[np.ndarray], least: int) -> list[int]:
    """Batches of each task: in proportion to its cells' costs, of ``least`` cells or more if that can be."""
    wanted = np.array([c.sum() for c in costs])
    cells = np.array([len(c) for c in costs])
    parts = np.ones(len(costs), dtype=np.int64)
    while parts.sum() < number:
        for most in (cells // least, cells):
            if (parts < most).any():
                parts[np.argmax(np.where(parts < most, wanted / (parts + 0.5), -1.0))] += 1
                break
    return parts.tolist()
