"""Everything a trained model does: build a prompt, decode the rest.

This room takes sentences and gives arrays; AnnData enters one room further, in ``tl``.
"""
