"""One self-contained HTML file about annotated cells, for people to read.

What may enter here: reading results out of AnnData, the numbers, pictures and sentences of the page, and its template.
No torch, no model: a report is made from files alone. The extras ``report`` (jinja2, matplotlib, umap-learn) are
imported when a page is written, not before.
"""

from scmulan.report.page import write_report

__all__ = ["write_report"]
