"""Evaluate models: annotation, integration and generation, each beside a baseline.

Functions here take a model and labelled files and return a result with ``to_json()`` for machines and ``table()`` for
people. Metrics of integration are those of scib-metrics. Nothing of the vocabulary or the model is defined here, and
nothing is tuned on the cells that are scored.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
