"""What ships beside the code: the gene and ontology tables, the published word list and the shipped model.

Only data may enter here, each file named in ``LICENSES.md``; what others made is hashed in ``PROVENANCE.json``, with
its source. ``tools/build_resources.py`` makes the tables. No cells and no code other than this reader.
"""

import gzip
from importlib.resources import files

__all__ = ["read_bytes", "read_text"]


def read_bytes(name: str) -> bytes:
    """Return a packaged file as it is.

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
