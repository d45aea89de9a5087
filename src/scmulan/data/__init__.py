"""Cells for pre-training: which files, what their columns mean, and where their words are kept.

This room reads cells through the language room and knows nothing of networks; it imports no torch.
"""
