"""``scmulan.tl.generate``: generate cells from metadata."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scmulan._dist import inference_ranks
from scmulan._keys import UNS
from scmulan._progress import SILENT, Progress
from scmulan.errors import ScmulanError
from scmulan.generate.blocks import BlockConfig, decode_in_blocks
from scmulan.generate.decoding import CPU_ROWS, DecodingConfig, decode_cells
from scmulan.generate.speculative import MAX_DRAFT_LENGTH
from scmulan.infer.precision import Precision, apply_precision
from scmulan.model.loading import LoadedModel
from scmulan.tl._record import ModelLike, as_model, provenance
from scmulan.vocab.binning import debin
from scmulan.vocab.genes import match_genes
from scmulan.vocab.sentences import Sentences, decode
from scmulan.vocab.tasks import GENERATE
from scmulan.vocab.vocabulary import Family, family_of_field

GenerateRule = Literal["default", "exact", "release"]
BLOCKS = 8
"""Blocks of a cell. More let genes depend on more of each other, and take longer."""


def generate(
    model: ModelLike,
    metadata: Mapping[str, str] | None = None,
    *,
    n: int = 100,
    seed: int = 0,
    temperature: float = 1.0,
    rule: GenerateRule = "default",
    values: Literal["sample", "mean"] = "sample",
    genes: Sequence[str] | None = None,
    max_words: int = 1_550,
    draft: int | None = None,
    precision: Precision = "fp32",
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> ad.AnnData:
    """Generate cells from metadata.

    Parameters
    ----------
    model
        From :func:`scmulan.load`, or its name or folder.
    metadata
        What the cells should be: any subset of ``organ``, ``region``, ``age``, ``sex``, ``status``, ``technology``,
        ``cell_type_coarse``, ``cell_type``; e.g. ``{"organ": "Blood", "cell_type": "B cell"}``.
    n
        Number of cells.
    seed
        The same seed gives the same cells; the first cells do not depend on ``n``.
    temperature
        Below 1, likely genes are preferred.
    rule
        ``"default"``: what suits the model: in blocks with the number of genes of its training cells
        (:mod:`scmulan.generate.blocks`) where its card says how, else as ``"exact"``.
        ``"exact"``: each token from the model's likelihood given those before it; of a published model, by its
        probabilities (:mod:`scmulan.generate.sampling`).
        ``"release"``: softmax over the logits, values at their mean, as the published release samples.
    values
        ``"sample"`` draws each value from its distribution where the model has one, ``"mean"`` takes its mean.
    genes
        Genes that may be drawn, as symbols or Ensembl ids: cells then compare with a data set of that panel.
        Default: all of the model's genes.
    max_words
        Most genes of a cell.
    draft
        Tokens of a cell that are drafted and verified in one pass (:mod:`scmulan.generate.speculative`), where the
        rule draws token by token; 1 does without. Speed only: cells are the same. Default: what is fastest.
    precision
        ``"fp32"``, ``"bf16"``, ``"int8"``, or ``"auto"`` (:mod:`scmulan.infer.precision`). Another precision generates
        other cells.
    batch_size
        Cells decoded side by side. Speed only. Default: what suits the device and its memory.
    progress
        Shows how far it is.

    Returns
    -------
    anndata.AnnData
        ``n`` cells × the model's genes. ``X`` (float32 CSR): log1p of counts per 10,000, de-binned as in
        :func:`scmulan.vocab.binning.debin`; ``layers['level']``: the bins 1…10 as drawn;
        ``obs``: the prompt, ``words`` (number of genes), ``complete`` (False where ``max_words`` came first).

    Raises
    ------
    VocabularyError
        If a metadata field or value is unknown; the nearest ones are suggested.
    GeneError
        If too few of the model's genes are in ``genes``, or their names are those of another species.
    ModelError
        If the model or the precision cannot be used.
    ScmulanError
        If a number is out of bounds.

    Notes
    -----
    Under ``torchrun`` each process generates a part of the cells, and each gets all of them.
    """
    metadata = dict(metadata or {})
    _check_bounds(n=n, temperature=temperature, max_words=max_words, draft=draft, batch_size=batch_size)
    model = apply_precision(as_model(model), precision, tokens=CPU_ROWS)
    prompt = np.array([*model.vocabulary.metadata_ids(metadata), model.vocabulary.prompts[GENERATE.name]])
    panel = None if genes is None else _panel(model, genes)
    sampling = {
        "temperature": temperature,
        "sample_values": values == "sample" and rule != "release",
        "max_tokens": max_words,
    }
    config = _config(model, metadata, prompt, rule, sampling, draft, batch_size)
    sentences = _decode_shared(model, prompt, n, config, seed=seed, genes=panel, progress=progress)
    parameters = {
        "n": n,
        "seed": seed,
        "temperature": temperature,
        "rule": rule,
        "values": values,
        "max_words": max_words,
        "precision": model.network.precision,
        "panel": "all genes" if panel is None else f"{int(panel.sum())} genes",
    }
    return _to_adata(model, sentences, metadata, prompt, parameters)


def _check_bounds(**numbers: Any) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ScmulanError(f"{name} is {number}: expected a positive number")
    if numbers["draft"] is not None and numbers["draft"] > MAX_DRAFT_LENGTH:
        raise ScmulanError(f"draft is {numbers['draft']}: expected at most {MAX_DRAFT_LENGTH} words")


def _panel(model: LoadedModel, genes: Sequence[str]) -> np.ndarray:
    """Return which tokens are genes of a panel, bool ``[V]``."""
    match = match_genes(list(genes), model.vocabulary.genes, source="`genes`", warn_below=0.0)
    panel = np.zeros(len(model.vocabulary), dtype=bool)
    panel[model.vocabulary.ids(Family.GENE)[match.columns[match.columns >= 0]]] = True
    return panel


def _config(
    model: LoadedModel,
    metadata: Mapping[str, str],
    prompt: np.ndarray,
    rule: GenerateRule,
    sampling: Mapping[str, Any],
    draft: int | None,
    batch_size: int | None,
) -> BlockConfig | DecodingConfig:
    """Choose how to decode: in blocks where the card has a gene-count model, else token by token."""
    gene_counts = model.card.get("depth")
    if rule == "default" and gene_counts is not None:
        tokens = [model.vocabulary.tokens[i] for i in prompt]
        families = [str(family_of_field(field)) for field in metadata]
        effects = (gene_counts["words"][f].get(t, 0.0) for f, t in zip(families, tokens, strict=False))
        factor = float(np.exp(gene_counts["base"] + sum(effects)))
        return BlockConfig(
            blocks=BLOCKS,
            gene_count_factor=factor,
            gene_count_spread=float(gene_counts["spread"]),
            batch_size=batch_size or CPU_ROWS,
            **sampling,
        )
    published = model.objective == "published"
    by_objective: Literal["set", "softmax"] = "set" if published else "softmax"
    return DecodingConfig(
        rule="release" if rule == "release" else by_objective, draft=draft, batch_size=batch_size, **sampling
    )


def _decode_shared(
    model: LoadedModel,
    prompt: np.ndarray,
    n: int,
    config: BlockConfig | DecodingConfig,
    *,
    seed: int,
    genes: np.ndarray | None,
    progress: Progress,
) -> Sentences:
    """Decode this process's part of the cells, and return those of all processes."""
    with inference_ranks() as ranks:
        rows = slice(ranks.rank, None, ranks.world)
        with progress.bar(len(range(n)[rows])) as advance:
            if isinstance(config, BlockConfig):
                mine = decode_in_blocks(
                    model, prompt, n, config=config, seed=seed, rows=rows, genes=genes, advance=advance
                )
            else:
                mine = decode_cells(model, prompt, n, config=config, seed=seed, rows=rows, genes=genes, advance=advance)
        parts = ranks.gather([(*mine[i], int(mine.prompt[i])) for i in range(len(mine))])
    return Sentences.join([parts[i % ranks.world][i // ranks.world] for i in range(n)])


def _to_adata(
    model: LoadedModel,
    sentences: Sentences,
    metadata: Mapping[str, str],
    prompt: np.ndarray,
    parameters: Mapping[str, Any],
) -> ad.AnnData:
    vocabulary, n = model.vocabulary, len(sentences)
    cells = decode(sentences, vocabulary)
    covered = float(model.card.get("covered", 1.0))
    shape = (n, len(vocabulary.genes))
    x = sp.csr_matrix((debin(cells.indptr, cells.level, covered=covered), cells.gene, cells.indptr), shape=shape)
    level = sp.csr_matrix((cells.level, cells.gene, cells.indptr), shape=shape)
    requested = {str(family_of_field(f)): vocabulary.tokens[i] for f, i in zip(metadata, prompt, strict=False)}
    obs = pd.DataFrame(
        {f"prompt_{k}": pd.Categorical([v] * n) for k, v in requested.items()},
        index=pd.Index([f"generated-{parameters['seed']}-{i}" for i in range(n)]),
    )
    obs["words"] = np.diff(cells.indptr)
    obs["complete"] = cells.complete
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index(vocabulary.genes)), layers={"level": level})
    adata.uns[UNS] = provenance(model, "generate", parameters, prompt=requested, covered=covered)
    return adata
