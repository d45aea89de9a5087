"""Report: one self-contained HTML file about annotated cells.

It is made from files alone: results are read out of AnnData, without torch or a model. The packages of the extra
``report`` (jinja2, matplotlib, umap-learn) are imported when a page is written, not before.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
