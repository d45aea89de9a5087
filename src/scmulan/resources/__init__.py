"""Packaged data: the gene and ontology tables, the published vocabulary and the shipped model.

Only data may enter here, each file named in ``LICENSES.md``; files made by others are hashed in ``PROVENANCE.json``,
with their sources. ``tools/build_resources.py`` makes the tables. No cells and no code other than this reader.
"""

import gzip
from importlib.resources import files

__all__ = ["read_bytes", "read_text"]


def read_bytes(name: str) -> bytes:
    """Return the bytes of a packaged file.

    Parameters
    ----------
    name : str
        File name inside ``scmulan.resources``, such as ``vocabulary_release.json``.
    """
    return files(__name__).joinpath(name).read_bytes()


def read_text(name: str) -> str:
    """Return a packaged UTF-8 file as text, decompressed if its name ends in ``.gz``."""
    data = read_bytes(name)
    return (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
