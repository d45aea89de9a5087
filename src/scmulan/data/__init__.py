"""Cells for training: which files, what their columns mean, and where their tokens are kept.

The data's way: ``spec`` (the text) → ``readers`` (files in blocks) → ``memory`` or ``build`` + ``shards`` (cells in the
genes of one vocabulary) → :class:`~scmulan.data.store.CellSource` → ``sampling`` (order) → ``scmulan.train.batches``.

Training asks for cells through the protocol ``CellSource`` only. Three classes satisfy it: ``store.Corpus`` on disk,
``memory.CellStore`` in memory, and ``store.Selection``, a view of some cells of either (``split.select_part``).

This package imports no torch.
"""
