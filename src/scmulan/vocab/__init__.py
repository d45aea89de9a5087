"""The cell language: from an AnnData to tokens, and back.

In the order of the data: `matrix` and `storage` (which matrix, read in blocks), `gene_table` and `genes` (which column
is which gene), `ontology` (cell types), `vocabulary` (tokens and ids), `binning` (expression to levels), `tasks` and
`sentences` (tokens in order).

Only numpy, scipy, numba, pandas and anndata may enter, never torch: everything here is tested without a network.
Nothing here knows of models, of training, or of files other than the packaged tables and vocabularies.
"""
