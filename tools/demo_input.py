"""Write the demo's input: 700 blood cells of the 10x Genomics PBMC 68k data set, as they come with scanpy.

    python tools/demo_input.py OUT.h5ad

The file is like many files of users: scaled values in ``X``, log1p values in ``raw``, and the labels that were given by
comparison with sorted cells in ``obs['bulk_labels']``. scmulan does not use these labels; they are kept for comparison
with its predictions.
"""

import sys

import scanpy
from anndata import AnnData

from scmulan._io.adata import write_h5ad
from scmulan._io.outputs import check_output
from scmulan.errors import ScmulanError

OBS_COLUMNS = ["bulk_labels", "n_genes", "n_counts", "percent_mito"]


def main(arguments: list[str]) -> int:
    """Write the file named by the only argument; return the exit status."""
    if len(arguments) != 1:
        print("usage: python tools/demo_input.py OUT.h5ad", file=sys.stderr)
        return 2
    try:
        check_output(arguments[0], force=True, suffixes=(".h5ad",))
        write_h5ad(cells(), arguments[0])
    except ScmulanError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written: {arguments[0]}", file=sys.stderr)
    return 0


def cells() -> AnnData:
    """Return the cells, without embeddings, neighbours and other results."""
    cells = scanpy.datasets.pbmc68k_reduced()
    cells.obs = cells.obs[OBS_COLUMNS]
    cells.uns.clear()
    cells.obsm.clear()
    cells.varm.clear()
    cells.obsp.clear()
    return cells


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
