"""From cells to weights: objectives, the loop, its state on disk, fine-tuning.

This room may use language, corpus and model. It writes run folders; a finished run becomes a model folder.
"""
