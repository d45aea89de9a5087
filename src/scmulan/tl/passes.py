"""The way through a model: blocks of cells in, arrays of each block out, shared among processes and resumable."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from scmulan.files import BlockArray
from scmulan.inference.engine import Progress, word_budget
from scmulan.inference.memory import WordBudget
from scmulan.inference.precision import Precision, apply_precision, choose_precision
from scmulan.inference.ranks import Ranks, ranks
from scmulan.language.expression import CellWords
from scmulan.language.sentence import Sentences, gene_prompts
from scmulan.language.tasks import ANNOTATE
from scmulan.model.checkpoint import LoadedModel
from scmulan.model.cost import forward_flops_per_word
from scmulan.tl.parts import Parts
from scmulan.tl.reading import BLOCK, CellReader

Rule = Literal["default", "stepwise", "release"]
RULES: tuple[str, ...] = get_args(Rule)
# Does one block: model, prompts, words, budget → arrays, one row per cell each.
Work = Callable[[LoadedModel, Sentences, CellWords, WordBudget], dict[str, np.ndarray]]

# A block that is not finished is lost when a job is interrupted: about a minute of work of a core, or of a GPU.
BLOCK_FLOPS = {"cpu": 5e12, "cuda": 5e15, "mps": 1e14}
LIKELY_WORDS = 500
FEWEST_CELLS = 128


def block_cells(model: LoadedModel) -> int:
    """Cells of one block."""
    flops = LIKELY_WORDS * forward_flops_per_word(model.config, context=LIKELY_WORDS / 2)
    cells = BLOCK_FLOPS.get(model.network.word.weight.device.type, BLOCK_FLOPS["cuda"]) / flops
    return int(np.clip(2 ** int(np.log2(max(1, cells))), FEWEST_CELLS, BLOCK))


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """Results of all blocks of a job.

    Parameters
    ----------
    parts
        Where they are.
    cells
        Cells of each block.
    precision
        That the model was used in.
    """

    parts: Parts
    cells: list[int]
    precision: str

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Arrays of all cells, in the input's order."""
        read = [self.parts.get(i, names) for i in range(len(self.cells))]
        return {name: np.concatenate([part[name] for part in read]) for name in names}

    def states(self, width: int) -> BlockArray:
        """The embedding, float32 ``[cells, width]``, read from the parts block by block."""

        def read() -> Iterator[np.ndarray]:
            for i in range(len(self.cells)):
                yield self.parts.get(i, ("state",))["state"]

        return BlockArray(shape=(sum(self.cells), width), dtype=np.float32, blocks=read)


def run_blocks(
    reader: CellReader,
    model: LoadedModel,
    work: Work,
    *,
    rule: Rule = "default",
    precision: Precision,
    batch_words: int | None,
    parts: Parts | None,
    progress: Progress,
) -> Done:
    """Do all blocks that are not done yet, under ``torchrun`` this process's share; each has all results afterwards.

    Parameters
    ----------
    reader
        The cells.
    model
        In float32.
    work
        Does a block; tells ``progress`` of each cell itself.
    rule
        The release's is decoded in float32 unless another precision is asked for by name.
    precision
        ``"auto"`` chooses with the first cells (:func:`choose_precision`); among several processes it takes
        what is known already.
    batch_words
        Padded words per pass, None for what suits.
    parts
        Where results go, in memory by default; blocks that are there are not done again.
    progress
        Told of the cells whose results are there already.

    Returns
    -------
    Done
        With the arrays that ``work`` gives, and ``words`` and ``covered`` of each cell.
    """
    parts = parts or Parts()
    with ranks() as here:
        return _run(reader, model, work, rule, precision, batch_words, parts, here, progress)


def _run(
    reader: CellReader,
    model: LoadedModel,
    work: Work,
    rule: Rule,
    precision: Precision,
    batch_words: int | None,
    parts: Parts,
    ranks: Ranks,
    progress: Progress,
) -> Done:
    size = block_cells(model)
    blocks = [slice(start, min(start + size, len(reader))) for start in range(0, len(reader), size)]
    todo = {i for i in range(len(blocks)) if ranks.mine(i) and i not in parts}
    progress(sum(rows.stop - rows.start for i, rows in enumerate(blocks) if ranks.mine(i) and i not in todo))
    chosen = _settled(model, rule, precision, parts, ranks)
    used = None if chosen == "auto" else apply_precision(model, chosen)
    budget = word_budget(model, batch_words)
    for rows, words in reader.blocks(size, wanted=lambda rows: rows.start // size in todo):
        prompts = gene_prompts(words, model.vocabulary, ANNOTATE)
        if used is None:
            used = choose_precision(model, prompts, total=len(reader))
            parts.settle({"precision": used.network.precision})
        arrays = work(used, prompts, words, budget)
        parts.put(rows.start // size, {**arrays, "words": words.lengths.astype(np.int32), "covered": words.covered})
    if parts.folder is None and ranks.world > 1:
        parts.take_in(ranks.share(parts))
    else:
        ranks.share(None)
    return Done(parts=parts, cells=[b.stop - b.start for b in blocks], precision=(used or model).network.precision)


def without_empty(states: np.ndarray, words: CellWords) -> np.ndarray:
    """States with zeros for cells without gene words."""
    return np.where(words.lengths[:, None] > 0, states, np.float32(0))


def _settled(model: LoadedModel, rule: Rule, precision: Precision, parts: Parts, ranks: Ranks) -> Precision:
    """Precision of the job, so far as it can be told before any cell is read."""
    if precision != "auto":
        return precision
    if rule == "release":
        return "fp32"
    if len(parts.settled):
        precision = parts.settled["precision"]
    if ranks.world == 1:
        return precision
    known: Any = apply_precision(model, precision).network.precision
    return ranks.share(known)[0]
