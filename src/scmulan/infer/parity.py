"""Check a model folder, and compare the model with stored outputs of the published release.

A fixture of stored outputs is an ``.npz`` without pickles: ``config`` (JSON), ``expression`` (cells × genes, log1p),
``prompt_ids`` and ``prompt_values`` (padded with −1), ``entity_logits`` and ``value_outputs`` at the last prompt
position, ``annotation_ids``, ``annotation_values`` and ``annotation_ids_kv`` (both decoding rules), ``embedding``,
``generation_prompts`` (JSON), ``generated_ids`` and ``generated_values`` (prompt included). It is checked for sense
before anything is compared.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from scmulan.errors import InputError
from scmulan.infer.release_rule import ReleaseRule, annotate, decode, head_outputs
from scmulan.model.cost import kv_bytes_per_token
from scmulan.model.loading import LoadedModel, load_model
from scmulan.vocab.binning import tokenize
from scmulan.vocab.sentences import Sentences, gene_prompts
from scmulan.vocab.tasks import ANNOTATE, GENERATE
from scmulan.vocab.vocabulary import METADATA, Family, Vocabulary

# Arrays of a fixture: ids and values per cell, padded with −1; numbers per cell; ids and values per generation prompt.
PADDED = ("prompt_ids", "prompt_values", "annotation_ids", "annotation_values", "annotation_ids_kv")
NUMBERS = ("entity_logits", "value_outputs", "embedding")
GENERATED = ("generated_ids", "generated_values")
# Not among what the release's fixtures hold, but compared where a file has it.
OPTIONAL = ("annotation_values_kv",)
# Entries of ``config`` and our names for them; its other entries (the seed) say nothing about the network's shape.
SETTINGS = {name: name for name in ("layers", "heads", "width", "bias", "levels", "vocabulary")} | {
    "vocab": "vocabulary"
}
# Largest absolute difference of logits, expected bins and embeddings.
TOLERANCE = 1e-4
# Largest batch: rows, and bytes of keys and values.
MAX_ROWS, MAX_CACHE_BYTES = 16, 2**30

# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One number or setting in which the model is not what it should be."""

    what: str
    """Name of the array or setting of the fixture, or of the weight of the model."""
    cell: int | None = None
    """Row of the array: index of the cell, or of the generation prompt."""
    word: str | None = None
    """Token of the vocabulary, or index in the row."""
    expected: float | int | str | None
    """Content of the fixture."""
    found: float | int | str | None
    """Output of the model."""

    def __str__(self) -> str:
        row = "prompt" if self.what in GENERATED else "cell"
        where = [self.what, *([] if self.cell is None else [f"{row} {self.cell}"]), *([self.word] if self.word else [])]
        return f"{', '.join(where)}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Result of comparing one array."""

    compared: int
    """Number of numbers compared."""
    different: int
    """Number of those that differ by more than the tolerance or are not finite."""
    max_difference: float | None
    """Largest absolute difference; None where it is not finite or nothing was compared."""
    tolerance: float
    """Largest absolute difference allowed; 0 for ids and bins."""


@dataclass(kw_only=True, slots=True)
class ParityReport:
    """Result of a verification."""

    model: str
    """The model, as it was named."""
    weights_hash: str
    """sha256 of its weights."""
    fixture: str | None = None
    """Fixture file, or None where the model was checked alone."""
    cells: int = 0
    """Number of cells of the fixture."""
    checks: dict[str, Check] = field(default_factory=dict)
    """Result of each comparison, in the order made."""
    absent: list[str] = field(default_factory=list)
    """Arrays that were not compared because the fixture lacks them or what they need."""
    first_difference: Difference | None = None
    """The first difference, or None."""

    @property
    def passed(self) -> bool:
        """Whether there is no difference."""
        return self.first_difference is None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, with ``passed`` and a one-line ``summary``."""
        return {"passed": self.passed, "summary": str(self), **asdict(self)}

    def __str__(self) -> str:
        if self.first_difference is not None:
            return f"{self.model} is not as {self.fixture or 'its files promise'}: {self.first_difference}"
        if self.fixture is None:
            return f"{self.model}: files, shapes and one forward pass are in order"
        worst = max((c.max_difference or 0.0 for c in self.checks.values()), default=0.0)
        absent = f" (not in the fixture: {', '.join(self.absent)})" if self.absent else ""
        return f"{self.model} agrees with {self.fixture}: {self.cells} cells, largest difference {worst:.1e}{absent}"


# -- the verification --------------------------------------------------------------------------------------------------


def verify(model: str | Path, fixture: str | Path | None = None, *, device: str = "cpu") -> ParityReport:
    """Check a model folder, and compare the model with stored outputs.

    Parameters
    ----------
    model
        Path of a model folder, or the name of a packaged model.
    fixture
        ``.npz`` to compare with (format: :mod:`scmulan.infer.parity`): logits, value outputs and embeddings to 1e-4,
        prompts and decoded tokens exactly. Without one, hashes, shapes and one forward pass are checked.
    device
        Where to run, in float32.

    Returns
    -------
    ParityReport
        ``passed``, the first difference, and the largest difference of each array.

    Raises
    ------
    ModelError
        If the folder is no usable model (a file missing, altered or not fitting).
    InputError
        If the fixture cannot be read or contradicts itself.
    """
    stored = None if fixture is None else read_fixture(fixture)
    loaded = load_model(model, device=device)
    report = ParityReport(model=str(model), weights_hash=loaded.weights_hash)
    if stored is None:
        _check_finite(loaded, report)
        return report
    report.fixture, report.cells = str(fixture), stored.cells
    compare = _Comparison(report, stored, loaded.vocabulary)
    if compare.shapes(loaded):
        _compare_cells(loaded, stored, compare)
        if stored.generation_prompts and "generated_ids" in stored.arrays:
            _compare_generation(loaded, stored, compare)
        if not report.checks:
            raise InputError(f"fixture {fixture}: none of the outputs to compare with is there")
        report.absent = [name for name in (*PADDED, *NUMBERS, *GENERATED) if name not in report.checks]
    return report


def _check_finite(loaded: LoadedModel, report: ParityReport) -> None:
    """Check that weights, and outputs after a prompt of some genes, are finite numbers."""
    genes = loaded.vocabulary.ids(Family.GENE)[:64]
    entity = np.append(genes, loaded.vocabulary.prompts[ANNOTATE.name])
    value = np.append(np.arange(len(genes)) % loaded.config.levels + 1, 0)
    logits, values = head_outputs(loaded.network, Sentences.join([(entity, value, len(entity))]))
    finite = {name: weight.isfinite().cpu().numpy() for name, weight in loaded.network.state_dict().items()}
    finite |= {"entity_logits": np.isfinite(logits), "value_outputs": np.isfinite(values)}
    for what, good in finite.items():
        bad = int(good.size - good.sum())
        report.checks[what] = Check(compared=good.size, different=bad, max_difference=None, tolerance=0.0)
        if bad and report.first_difference is None:
            report.first_difference = Difference(what=what, expected="finite numbers", found=f"{bad} that are not")


def _compare_cells(loaded: LoadedModel, fixture: "Fixture", compare: "_Comparison") -> None:
    """Compare prompts, head outputs, annotation by both rules and embeddings of the fixture's cells."""
    if fixture.expression is None:
        prompts = fixture.prompts(loaded.config.vocabulary, loaded.config.levels)
    else:
        # The model reads our own reading of the expression, which has to be the stored prompt as well.
        genes = fixture.expression.shape[1]
        columns = np.arange(genes, dtype=np.int32)
        matrix = sp.csr_matrix(fixture.expression.astype(np.float32))
        tokens = tokenize(matrix, columns, genes, matrix_kind="log1p", levels=loaded.config.levels)
        prompts = gene_prompts(tokens, loaded.vocabulary, ANNOTATE)
        entity, value, lengths = prompts.padded()
        inside = np.arange(entity.shape[1]) < lengths[:, None]
        compare.exact("prompt_ids", np.where(inside, entity, -1))
        compare.exact("prompt_values", np.where(inside, value, -1))
    if prompts is None:
        return
    network, end = loaded.network, loaded.vocabulary.end
    batch_size = _batch_size(loaded, int(prompts.lengths.max()))
    logits, values = head_outputs(network, prompts, batch_size=batch_size)
    compare.close("entity_logits", logits, compare.token_name)
    compare.close("value_outputs", values, compare.token_name)
    rules: tuple[tuple[ReleaseRule, str], ...] = (("release", ""), ("release_cache", "_kv"))
    for rule, suffix in rules:
        decoded = annotate(network, prompts, end=end, rule=rule, batch_size=batch_size)
        compare.exact(f"annotation_ids{suffix}", decoded.entity)
        compare.exact(f"annotation_values{suffix}", decoded.value)
        if rule == "release":
            compare.close("embedding", decoded.embedding, "dimension {}".format)


def _compare_generation(loaded: LoadedModel, fixture: "Fixture", compare: "_Comparison") -> None:
    """Compare greedy generation after each of the fixture's generation prompts."""
    prompt_token, end = loaded.vocabulary.prompts[GENERATE.name], loaded.vocabulary.end
    ids = [
        np.array([*(_metadata_token(fixture, loaded.vocabulary, name) for name in names), prompt_token])
        for names in fixture.generation_prompts
    ]
    prompts = Sentences.join([(entity, np.zeros_like(entity), len(entity)) for entity in ids])
    limits = fixture.generation_limits(prompts.lengths, end)
    batch_size = _batch_size(loaded, int((prompts.lengths + limits).max()))
    decoded = decode(
        loaded.network, prompts, max_tokens=int(limits.max()), end=end, rule="release_cache", batch_size=batch_size
    )
    shape = (len(ids), int(prompts.lengths.max()) + decoded.entity.shape[1])
    entity, value = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for i, prompt in enumerate(ids):
        n, new = len(prompt), min(int(limits[i]), decoded.entity.shape[1])
        entity[i, :n], value[i, :n] = prompt, 0
        entity[i, n : n + new], value[i, n : n + new] = decoded.entity[i, :new], decoded.value[i, :new]
    compare.exact("generated_ids", entity)
    compare.exact("generated_values", value)


def _metadata_token(fixture: "Fixture", vocabulary: Vocabulary, name: str) -> int:
    for family in METADATA:
        found = vocabulary.find(family, name)
        if found is not None:
            return found
    raise InputError(f"fixture {fixture.path}: generation prompt with {name!r}, which is no metadata word of the model")


def _batch_size(loaded: LoadedModel, n_tokens: int) -> int:
    """Return how many sentences of ``n_tokens`` have keys and values of no more than a gigabyte."""
    return max(1, min(MAX_ROWS, MAX_CACHE_BYTES // (kv_bytes_per_token(loaded.config, "fp32") * n_tokens)))


class _Comparison:
    """Comparison of arrays with the fixture's of the same name; results go into the report."""

    def __init__(self, report: ParityReport, fixture: "Fixture", vocabulary: Vocabulary) -> None:
        self.report, self.fixture, self.vocabulary = report, fixture, vocabulary

    def shapes(self, loaded: LoadedModel) -> bool:
        """Compare the network's shape and the number of genes; where they differ, nothing else can be compared."""
        pairs = [(f"config {n}", value, getattr(loaded.config, n)) for n, value in self.fixture.settings.items()]
        if self.fixture.expression is not None:
            pairs.append(("number of genes", self.fixture.expression.shape[1], len(self.vocabulary.genes)))
        for what, expected, found in pairs:
            if expected != found:
                self.report.first_difference = Difference(what=what, expected=expected, found=found)
                return False
        return True

    def token_name(self, i: int) -> str:
        """Return how a token is named in a difference."""
        return f"word {self.vocabulary.tokens[i]!r}"

    def exact(self, what: str, found: np.ndarray) -> None:
        """Compare ids or bins, padded with −1, which have to be equal."""
        if what in self.fixture.arrays:
            expected = self.fixture.arrays[what].astype(np.int64)
            width = max(expected.shape[1], found.shape[1])
            both = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-1) for a in (expected, found)]
            self._compare(what, both[0], both[1], 0.0, "index {}".format)

    def close(self, what: str, found: np.ndarray, name: Callable[[int], str]) -> None:
        """Compare numbers, which have to agree within the tolerance; ``name`` says what a column is."""
        if what in self.fixture.arrays:
            expected = self.fixture.arrays[what].astype(np.float64)
            self._compare(what, expected, found.astype(np.float64), TOLERANCE, name)

    def _compare(
        self, what: str, expected: np.ndarray, found: np.ndarray, tolerance: float, name: Callable[[int], str]
    ) -> None:
        with np.errstate(invalid="ignore"):
            difference = np.abs(expected - found)
        wrong = ~(difference <= tolerance)  # NaN is a difference too
        largest = float(difference.max())
        self.report.checks[what] = Check(
            compared=wrong.size,
            different=int(wrong.sum()),
            max_difference=largest if math.isfinite(largest) else None,
            tolerance=tolerance,
        )
        if wrong.any() and self.report.first_difference is None:
            cell, i = (int(n) for n in np.argwhere(wrong)[0])
            stored, ours = (self._shown(what, a[cell, i]) for a in (expected, found))
            self.report.first_difference = Difference(what=what, cell=cell, word=name(i), expected=stored, found=ours)

    def _shown(self, what: str, number: Any) -> float | int | str:
        if isinstance(number, np.floating):
            return float(number) if math.isfinite(number) else str(number)
        if number < 0:
            return "nothing"
        if "ids" in what and number < len(self.vocabulary):
            return f"{int(number)} ({self.vocabulary.tokens[number]})"
        return int(number)


# -- reading a fixture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixture:
    """Stored outputs of a network."""

    path: Path
    """The file."""
    settings: dict[str, int]
    """Shape of the network that made it, under our names, as far as the file says."""
    arrays: dict[str, np.ndarray]
    """Arrays to compare with, each two-dimensional: one row per cell or generation prompt."""
    expression: np.ndarray | None
    """log1p values ``[cells, genes]``."""
    generation_prompts: list[list[str]]
    """Metadata tokens of each generation prompt; empty where the file has none."""

    @property
    def cells(self) -> int:
        """Number of cells."""
        if self.expression is not None:
            return len(self.expression)
        return max((len(a) for n, a in self.arrays.items() if n not in GENERATED), default=0)

    def prompts(self, vocabulary: int, levels: int) -> Sentences | None:
        """Return the stored prompts, or None where there are none.

        Raises
        ------
        InputError
            If they hold ids or bins that the network has no embedding for.
        """
        if not {"prompt_ids", "prompt_values"} <= set(self.arrays):
            return None
        ids, values = self.arrays["prompt_ids"], self.arrays["prompt_values"]
        lengths = _lengths(ids)
        inside = np.arange(ids.shape[1]) < lengths[:, None]
        for name, array, limit in (("prompt_ids", ids, vocabulary), ("prompt_values", values, levels + 1)):
            wrong = inside & ((array < 0) | (array >= limit))
            if wrong.any() or array.shape != ids.shape or lengths.min() == 0:
                raise InputError(
                    f"fixture {self.path}: {name} of cell {int(np.argmax(wrong.any(1)))} "
                    f"is no prompt, expected at least one number of 0 … {limit - 1}, then −1"
                )
        return Sentences.join([(ids[i, :n], values[i, :n], int(n)) for i, n in enumerate(lengths)])

    def generation_limits(self, prompt_lengths: np.ndarray, end: int) -> np.ndarray:
        """Infer how many tokens may follow each generation prompt, int64 ``[prompts]``: the file does not say it.

        Sentences without an end token stopped at a limit, of new tokens or of all tokens: whichever explains more of
        the rows.
        """
        ids = self.arrays["generated_ids"]
        total = _lengths(ids)
        new = total - prompt_lengths
        if new.min() < 1:
            raise InputError(
                f"fixture {self.path}: row {int(np.argmax(new < 1))} of generated_ids ends with its prompt"
            )
        cut = ids[np.arange(len(ids)), total - 1] != end
        if not cut.any():
            return np.full(len(ids), new.max())
        (limit_new, rows_new), (limit_total, rows_total) = _most_common(new[cut]), _most_common(total[cut])
        return np.full(len(ids), limit_new) if rows_new >= rows_total else limit_total - prompt_lengths


def read_fixture(path: str | Path) -> Fixture:
    """Read a fixture, any of whose arrays to compare may be absent.

    Raises
    ------
    InputError
        If the file is no fixture or contradicts itself; one line that names the array.
    """
    path = Path(path)
    raw = _read_npz(path)
    arrays = {name: raw[name] for name in (*PADDED, *NUMBERS, *GENERATED, *OPTIONAL) if name in raw}
    expression = raw.get("expression")
    prompts = _json(path, raw, "generation_prompts", list) if "generation_prompts" in raw else []
    if not all(isinstance(p, list) and all(isinstance(word, str) for word in p) for p in prompts):
        raise InputError(f"fixture {path}: generation_prompts is no list of lists of words")
    if expression is None and not {"prompt_ids", "prompt_values"} <= set(arrays) and not prompts:
        raise InputError(f"fixture {path}: neither expression nor prompts, nothing to compare a model with")
    _check_arrays(path, arrays, expression, len(prompts))
    settings = _settings(path, _json(path, raw, "config", dict), arrays)
    return Fixture(path=path, settings=settings, arrays=arrays, expression=expression, generation_prompts=prompts)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"fixture {path}: no such file, expected an .npz of stored outputs")
    try:
        with open(path, "rb") as handle:
            file = np.load(handle, allow_pickle=False)
            if isinstance(file, np.lib.npyio.NpzFile):
                return {name: file[name] for name in file.files}
    except Exception as error:  # noqa: BLE001 - any bytes may be in the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"fixture {path}: not readable as .npz without pickles ({reason})") from None
    raise InputError(f"fixture {path}: a single array, expected an .npz of stored outputs")


def _json(path: Path, raw: dict[str, np.ndarray], name: str, kind: type) -> Any:
    try:
        content = json.loads(str(raw[name]))
    except KeyError:
        raise InputError(f"fixture {path}: no {name}; it holds {', '.join(raw) or 'nothing'}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"fixture {path}: {name} is not JSON ({error.msg})") from None
    if not isinstance(content, kind):
        raise InputError(f"fixture {path}: {name} is a JSON {type(content).__name__}, expected a {kind.__name__}")
    return content


def _settings(path: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Collect the network's shape from ``config`` and from the arrays, which must not contradict each other."""
    settings: dict[str, int] = {}
    sources = [(SETTINGS[key], value, f"config {key}") for key, value in config.items() if key in SETTINGS]
    columns = [("vocabulary", n) for n in ("entity_logits", "value_outputs")] + [("width", "embedding")]
    sources += [(name, arrays[array].shape[1], f"the width of {array}") for name, array in columns if array in arrays]
    for name, value, source in sources:
        if not isinstance(value, int):
            raise InputError(f"fixture {path}: {source} is {value!r}, expected a whole number or true or false")
        if settings.setdefault(name, value) != value:
            raise InputError(f"fixture {path}: {source} is {value}, but another part says {settings[name]}")
    return settings


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], expression: np.ndarray | None, prompts: int) -> None:
    """Check dimensions, types and numbers of rows; the numbers themselves are for the comparison."""
    if prompts == 0:
        for name in GENERATED:
            arrays.pop(name, None)  # sentences without their prompts cannot be generated again
    cells: int | None = None
    for name, array in (arrays if expression is None else {"expression": expression, **arrays}).items():
        wanted = np.floating if name in (*NUMBERS, "expression") else np.integer
        if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, wanted):
            raise InputError(
                f"fixture {path}: {name} is {array.dtype} {list(array.shape)}, "
                f"expected {'floating-point' if wanted is np.floating else 'whole'} numbers in rows"
            )
        rows = prompts if name in GENERATED else len(array) if cells is None else cells
        cells = cells if name in GENERATED else rows
        if len(array) != rows:
            raise InputError(f"fixture {path}: {name} has {len(array)} rows, expected {rows}")
    if expression is not None and not (np.isfinite(expression).all() and (expression >= 0).all()):
        raise InputError(f"fixture {path}: expression has values below zero or that are no numbers, expected log1p")


def _lengths(ids: np.ndarray) -> np.ndarray:
    """Return the length of each row up to the last number that is no padding."""
    return (np.arange(1, ids.shape[1] + 1) * (ids >= 0)).max(1)


def _most_common(numbers: np.ndarray) -> tuple[int, int]:
    """Return the most common number, and how often it comes."""
    values, counts = np.unique(numbers, return_counts=True)
    return int(values[counts.argmax()]), int(counts.max())
