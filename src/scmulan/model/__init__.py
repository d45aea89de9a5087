"""The network and its files: what turns tokens into hidden states, and how a model is stored.

Nothing in this package reads cells or knows about AnnData; a model folder is the only thing on disk that it writes.
"""
