"""Compiled passes over cells: fold genes, gather rows of a shard, hash contents, moments of genes."""

import numpy as np
import scipy.sparse as sp

from scmulan.jit import compiled


@compiled()
def hash_rows(words, ends, out):
    """Hash the words (uint32) of each row; ``out`` is uint64."""
    k = 0
    for row in range(len(ends)):
        h = np.uint64(0x9E3779B97F4A7C15)
        while k < ends[row]:
            # The finaliser of splitmix64, once per word.
            h ^= np.uint64(words[k])
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h ^= h >> np.uint64(31)
            k += 1
        out[row] = h


@compiled()
def gather(words, start, place, decode, indptr, indices, data):
    """Copy cells of one shard to their places in a CSR matrix.

    ``start`` is where each cell's words begin in the shard, ``place`` the row it gets.
    """
    for i in range(len(start)):
        k = start[i]
        for out in range(indptr[place[i]], indptr[place[i] + 1]):
            indices[out] = words[k, 0]
            data[out] = decode[words[k, 1]]
            k += 1


@compiled()
def _fold(data, indices, indptr, columns, genes, logged, gene, value, length, total, inside):
    scratch = np.zeros(genes, dtype=np.float64)
    n = 0
    for row in range(len(indptr) - 1):
        everything = 0.0
        known = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            x = float(data[k])
            amount = np.expm1(x) if logged else x
            everything += amount
            g = columns[indices[k]]
            if g >= 0:
                if scratch[g] == 0:
                    # One column per gene is the rule: its value stays as it is, to the last bit.
                    scratch[g] = x
                elif logged:
                    scratch[g] = np.log1p(np.expm1(scratch[g]) + amount)
                else:
                    scratch[g] += x
                known += amount
        first = n
        for g in range(genes):
            if scratch[g] > 0:
                gene[n] = g
                value[n] = scratch[g]
                scratch[g] = 0.0
                n += 1
        length[row] = n - first
        total[row] = everything
        inside[row] = known
    return n


def fold(
    block: sp.csr_matrix, columns: np.ndarray, genes: int, *, logged: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bring cells into the genes of a vocabulary; columns of one gene are summed, on counts.

    Parameters
    ----------
    block
        CSR float32 ``[cells, columns]``, without stored zeros.
    columns
        int32 ``[columns]``: place among the genes, or −1.
    genes
        Number of genes.
    logged
        Whether values are log1p.

    Returns
    -------
    lengths, gene, value : numpy.ndarray
        int64 ``[cells]``, and int32 and float32 ``[words]``, ascending by gene within a cell.
    total, inside : numpy.ndarray
        float64 ``[cells]``: sum over all columns, and over those of genes (of counts, or counts per 10,000).
    """
    cells = block.shape[0]
    gene, value = np.empty(block.nnz, np.int32), np.empty(block.nnz, np.float32)
    lengths = np.zeros(cells, np.int64)
    total, inside = np.zeros(cells), np.zeros(cells)
    n = _fold(block.data, block.indices, block.indptr, columns, genes, logged, gene, value, lengths, total, inside)
    return lengths, gene[:n], value[:n], total, inside
