"""The tasks, each defined once: which words are the prompt, which are the target.

A sentence is: prompt words, the task's prompt word, target words, end word. The published model learns three tasks
on the same sentences. A new task is one more entry in ``TASKS`` and a prompt word in the vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@dataclass(frozen=True)
class Task:
    """One way to divide a sentence into what is given and what is to be said.

    Parameters
    ----------
    name
        Key of the task's prompt word in ``Vocabulary.prompts``.
    given
        Families whose words are always in the prompt.
    hinted
        Families whose words are in the prompt at random, each subset possible.
    asked
        Families whose words are the target, in this order; genes among them are in random order.
    """

    name: str
    given: tuple[Family, ...]
    hinted: tuple[Family, ...]
    asked: tuple[Family, ...]

    def sayable(self, vocabulary: Vocabulary) -> np.ndarray:
        """Bool per word: whether an answer can hold it (a word of an asked family, or the end)."""
        mask = np.zeros(len(vocabulary), dtype=bool)
        for family in (*self.asked, Family.END):
            mask[vocabulary.ids(family)] = True
        return mask


GENERATE = Task("generate", given=(), hinted=METADATA, asked=(Family.GENE,))
ANNOTATE = Task("annotate", given=(Family.GENE,), hinted=(Family.ORGAN,), asked=(Family.COARSE, Family.FINE))
LOCATE = Task("locate", given=(Family.GENE,), hinted=(Family.FINE,), asked=(Family.ORGAN, Family.REGION))
TASKS = {task.name: task for task in (GENERATE, ANNOTATE, LOCATE)}


def draw_hints(task: Task, known: dict[Family, int], rng: np.random.Generator) -> list[int]:
    """Random subset of the known hinted words, in random order.

    The subset's size is uniform first, then its members: small and full prompts are equally common, whereas
    independent coin flips would make both rare.
    """
    ids = list(dict.fromkeys(known[f] for f in task.hinted if f in known))
    size = int(rng.integers(len(ids) + 1))
    return [ids[i] for i in rng.permutation(len(ids))[:size]]
