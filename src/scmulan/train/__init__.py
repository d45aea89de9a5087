"""From cells to weights: batches, losses, the training loop, checkpoints, fine-tuning.

The data's way: per-cell tables → planned sentences (``sentence_plan``) → the cells' expression → sentences and targets
(``sentence_kernels``, ``batches``) → hidden states → loss (``losses``) → step, log, checkpoint (``trainer``,
``checkpoint``) → model folder (``export``). The order of cells is a function of (seed, step), so nothing random is
saved.

This package may use ``vocab``, ``data`` and ``model``.
"""
