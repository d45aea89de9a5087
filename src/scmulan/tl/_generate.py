"""What would such a cell look like?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import scmulan
from scmulan._dist import inference_ranks
from scmulan._keys import UNS
from scmulan._progress import Advance as Progress
from scmulan.errors import ScmulanError
from scmulan.generate.blocks import generate_in_blocks
from scmulan.generate.decoding import CPU_ROWS, DecodingConfig, decode_cells
from scmulan.generate.sampling import Rule
from scmulan.generate.speculative import MOST
from scmulan.infer.precision import Precision, apply_precision
from scmulan.model.loading import LoadedModel
from scmulan.vocab.binning import debin
from scmulan.vocab.genes import match_genes
from scmulan.vocab.sentences import Sentences, decode
from scmulan.vocab.tasks import GENERATE
from scmulan.vocab.vocabulary import Family, family_of_field

GenerateRule = Literal["default", "exact", "release"]
# More blocks let genes depend on more of each other, and take longer.
BLOCKS = 8


def generate(
    model: LoadedModel,
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
    batch: int | None = None,
    progress: Progress = lambda n: None,
) -> ad.AnnData:
    """Write new cells; under ``torchrun`` each process writes its share, and all get all cells.

    Parameters
    ----------
    model
        From :func:`scmulan.load`.
    metadata
        What the cells should be: any subset of ``organ``, ``region``, ``age``, ``sex``, ``status``, ``technology``,
        ``cell_type_coarse``, ``cell_type``; e.g. ``{"organ": "Blood", "cell_type": "B cell"}``.
    n
        Number of cells.
    seed
        The same seed gives the same cells; the first cells do not depend on ``n``.
    temperature
        Below 1 the likely genes are preferred.
    rule
        ``"default"``: what suits the model: in blocks with the number of genes of its training cells
        (:mod:`scmulan.generate.blocks`) where its card says how, else as ``"exact"``.
        ``"exact"``: each word from the model's likelihood given those before it; of a published model, by its chances
        (:mod:`scmulan.generate.sampling`).
        ``"release"``: softmax over the logits, values at their mean, as the published release samples.
    values
        ``"sample"`` draws each value from its distribution where the model has one, ``"mean"`` takes its mean.
    genes
        Genes that may be written, as symbols or Ensembl ids: cells then compare with a data set of that panel.
        Default: all of the model's genes.
    max_words
        Most genes of a cell.
    draft
        Words of a cell that are guessed and then checked in one pass (:mod:`scmulan.generate.speculative`), where the
        rule says words one by one; 1 does without. Speed only: cells are the same. Default: as many as are fastest.
    precision
        In what to compute: ``"fp32"``, ``"bf16"``, ``"int8"``, or ``"auto"`` (:mod:`scmulan.infer.precision`).
        Another precision writes other cells.
    batch
        Cells written side by side; cells do not depend on it. Default: what suits the device and its memory.
    progress
        Called with the number of cells just done.

    Returns
    -------
    anndata.AnnData
        ``n`` cells × the model's genes. ``X`` (float32 CSR): log1p of counts per 10,000, de-binned as in
        :func:`scmulan.vocab.binning.debin`; ``layers['level']``: the bins 1…10 as written;
        ``obs``: the prompt, ``words`` (genes written), ``complete`` (False where ``max_words`` came first).

    Raises
    ------
    VocabularyError
        If a metadata field or word is unknown; the nearest words are suggested.
    """
    metadata = dict(metadata or {})
    _positive(n=n, temperature=temperature, max_words=max_words, draft=draft, batch=batch)
    if draft is not None and draft > MOST:
        raise ScmulanError(f"draft is {draft}: expected at most {MOST} words")
    model = apply_precision(model, precision, tokens=CPU_ROWS)
    vocabulary = model.vocabulary
    prompt = np.array([*vocabulary.metadata_ids(metadata), vocabulary.prompts[GENERATE.name]])
    allowed = None
    if genes is not None:
        match = match_genes(list(genes), vocabulary.genes, source="`genes`", warn_below=0.0)
        allowed = np.zeros(len(vocabulary), dtype=bool)
        allowed[vocabulary.ids(Family.GENE)[match.columns[match.columns >= 0]]] = True
    shared: dict[str, Any] = {"n": n, "seed": seed, "genes": allowed, "progress": progress}
    how: dict[str, Any] = {
        "temperature": temperature,
        "sample_values": values == "sample" and rule != "release",
        "max_words": max_words,
    }
    depth = model.card.get("depth")
    write: Callable[..., Sentences]
    if rule == "default" and depth is not None:
        factor = _depth_factor(depth, metadata, [vocabulary.tokens[i] for i in prompt])
        spread = float(depth["spread"])
        write = partial(
            generate_in_blocks, blocks=BLOCKS, factor=factor, spread=spread, batch=batch or CPU_ROWS, **how, **shared
        )
    else:
        config = DecodingConfig(rule=_rule(model, rule), draft=draft, batch=batch, **how)
        write = partial(decode_cells, config=config, **shared)
    with inference_ranks() as here:
        mine = write(model, prompt, share=slice(here.rank, None, here.world))
        given = here.gather([(*mine[i], int(mine.prompt[i])) for i in range(len(mine))])
    sentences = Sentences.join([given[i % here.world][i // here.world] for i in range(n)])
    cells = decode(sentences, vocabulary)
    covered = float(model.card.get("covered", 1.0))
    shape = (n, len(vocabulary.genes))
    x = sp.csr_matrix((debin(cells.indptr, cells.level, covered=covered), cells.gene, cells.indptr), shape=shape)
    level = sp.csr_matrix((cells.level, cells.gene, cells.indptr), shape=shape)
    words = {str(family_of_field(f)): vocabulary.tokens[i] for f, i in zip(metadata, prompt, strict=False)}
    obs = pd.DataFrame(
        {f"prompt_{k}": pd.Categorical([v] * n) for k, v in words.items()},
        index=pd.Index([f"generated-{seed}-{i}" for i in range(n)]),
    )
    obs["words"] = np.diff(cells.indptr)
    obs["complete"] = cells.complete
    out = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pd.Index(vocabulary.genes)), layers={"level": level})
    parameters = {
        "n": n,
        "seed": seed,
        "temperature": temperature,
        "rule": rule,
        "values": values,
        "max_words": max_words,
        "precision": model.network.precision,
        "panel": "all genes" if allowed is None else f"{int(allowed.sum())} genes",
    }
    out.uns[UNS] = {
        "version": scmulan.__version__,
        "model": str(model.card.get("name", model.folder.name)),
        "weights_hash": model.weights_hash,
        "prompt": words,
        "covered": covered,
        "parameters": {"generate": parameters},
    }
    return out


def _depth_factor(depth: Mapping[str, Any], metadata: Mapping[str, str], words: Sequence[str]) -> float:
    """Factor on the expected number of genes, from what the card says of the prompt's words."""
    families = (str(family_of_field(field)) for field in metadata)
    return float(
        np.exp(depth["base"] + sum(depth["words"][f].get(w, 0.0) for f, w in zip(families, words, strict=False)))
    )


def _rule(model: LoadedModel, rule: str) -> Rule:
    if rule == "release":
        return "release"
    return "set" if model.card.get("objective", "published") == "published" else "softmax"


def _positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ScmulanError(f"{name} is {number}: expected a positive number")
