"""Training tasks: which metadata and genes of a cell are the prompt, and which the target.

A sentence is: prompt, the task's prompt token, target, end token. The published model learns three tasks on the same
sentences. A new task is one more entry in ``TASKS`` and a prompt token in the vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary


@dataclass(frozen=True)
class Task:
    """One way to divide a sentence into prompt and target.

    Parameters
    ----------
    name
        Key of the task's prompt token in ``Vocabulary.prompts``.
    prompt
        Families whose tokens are always in the prompt.
    hints
        Families whose tokens are in the prompt at random, each subset possible.
    target
        Families whose tokens are the target, in this order; genes among them are in random order.
    """

    name: str
    prompt: tuple[Family, ...]
    hints: tuple[Family, ...]
    target: tuple[Family, ...]

    def allowed(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return which tokens a target can hold (its families, and the end): bool ``[vocabulary]``."""
        mask = np.zeros(len(vocabulary), dtype=bool)
        for family in (*self.target, Family.END):
            mask[vocabulary.ids(family)] = True
        return mask


GENERATE = Task("generate", prompt=(), hints=METADATA, target=(Family.GENE,))
ANNOTATE = Task("annotate", prompt=(Family.GENE,), hints=(Family.ORGAN,), target=(Family.COARSE, Family.FINE))
LOCATE = Task("locate", prompt=(Family.GENE,), hints=(Family.FINE,), target=(Family.ORGAN, Family.REGION))
TASKS = {task.name: task for task in (GENERATE, ANNOTATE, LOCATE)}
