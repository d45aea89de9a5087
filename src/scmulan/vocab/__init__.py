"""The cell language: words, sentences and tasks, and how expression becomes them.

Only numpy, scipy, numba, pandas and anndata may enter here, never torch: everything in this room
can be tested without a network. Nothing in it knows about models, training or files on disk other
than the packaged tables and vocabularies.
"""
