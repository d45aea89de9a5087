"""Inference over prompts: label scores, hidden states, the release's greedy rules; precision and size of a pass.

This package takes sentences and returns arrays; AnnData enters in :mod:`scmulan.tl`.
"""
