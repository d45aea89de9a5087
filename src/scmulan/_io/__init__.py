"""Files in and out.

`adata` opens inputs with errors that their owners understand, and writes results; `outputs` checks outputs before any
work starts, writes them whole or not at all, hashes and locks. What a file means to a package (corpus, checkpoint,
model folder) stays in that package; no torch.
"""
