"""Settings from TOML and JSON, read into typed dataclasses; errors name the setting and the nearest known word.

A settings class is a ``kw_only`` dataclass, best a frozen one, whose annotations say all that can be checked::

    @dataclass(kw_only=True, frozen=True, slots=True)
    class Sampling:
        order: Literal["weighted", "epoch"] = "weighted"
        power: Annotated[float, Meta(ge=0, le=1)] = 0.5
        tasks: dict[Annotated[str, OneOf(TASKS)], Annotated[float, Meta(gt=0)]] = field(default_factory=dict)
        matrix_kind: str = field(default="counts", metadata={"key": "state"})  # "state" in the file
        folder: str = field(metadata={"hint": "the folder of the corpus"})  # said where it is missing

What involves several settings belongs in ``__post_init__``: a ``ValueError`` raised there gets the file's name.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import msgspec
from msgspec import Meta

from scmulan.errors import RecipeError

__all__ = ["Meta", "OneOf", "convert", "nearest", "read_toml"]

T = TypeVar("T")
MAX_SHOWN = 60  # characters of a value in an error
MAX_LISTED = 30  # names in an error


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotation of a text that must be one of some names which only the program knows (else use ``Literal``)."""

    names: Collection[str]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Parse a TOML file.

    Parameters
    ----------
    path
        The file.
    what
        What it should hold, for errors: ``"a recipe"``.

    Raises
    ------
    RecipeError
        If the file cannot be read or is not TOML; the message has the line and column.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); expected the TOML text of {what}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from None


def convert(
    cls: type[T], raw: Mapping[str, Any], source: str, *, section: str = "", renamed: Mapping[str, str] | None = None
) -> T:
    """Convert a parsed table into a dataclass, strictly: unknown keys, wrong types and bounds are refused.

    Parameters
    ----------
    cls
        Dataclass; its fields may be dataclasses, lists and dicts of them, and whatever msgspec converts.
    raw
        Table as TOML or JSON gives it.
    source
        Name of the file, for errors.
    section
        Section of the file that ``raw`` is, for errors: ``"data"``.
    renamed
        Former keys with their new ones: ``{"batches.words": "batches.tokens"}``.

    Returns
    -------
    cls
        Missing keys have the class' defaults.

    Raises
    ------
    RecipeError
        One line: file, ``section.key``, what was given, what was expected, and the nearest known word.
    """
    out: T = _Converter(source, renamed or {}, list(_setting_names(cls, section))).convert(raw, cls, section)
    return out


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that is most like another one, or None where none reaches a likeness of ``cutoff``.

    Notes
    -----
    The ratio of matching blocks, plus a tenth for each of the first three letters that agree (as in Jaro-Winkler
    similarity): people misspell the ends of words.
    """

    def likeness(other: str) -> float:
        a, b = (text.casefold().replace("-", "_") for text in (word, other))
        prefix = next((i for i, (x, y) in enumerate(zip(a[:3], b[:3], strict=False)) if x != y), min(3, len(a), len(b)))
        return difflib.SequenceMatcher(None, a, b).ratio() + prefix / 10

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None


class _Converter:
    def __init__(self, source: str, renamed: Mapping[str, str], settings: list[str]) -> None:
        self.source = source
        self.renamed = renamed
        self.settings = settings

    def convert(self, value: Any, kind: Any, path: str) -> Any:
        """Convert a value to an annotated type; containers here, for the names of their keys, leaves by msgspec."""
        plain, annotations = _unwrap(kind)
        if value is None and _allows_none(kind):
            return None
        if dataclasses.is_dataclass(plain) and isinstance(plain, type):
            return self._section(value, plain, path)
        origin, arguments = typing.get_origin(plain), typing.get_args(plain)
        if origin is dict and isinstance(value, Mapping):
            for key in value:
                self._check_key(key, arguments[0], path)
            value = {key: self.convert(v, arguments[1], _join(path, key)) for key, v in value.items()}
            plain = origin
        elif origin in (list, tuple) and isinstance(value, (list, tuple)):
            value = [self.convert(v, arguments[0], f"{path}[{i}]") for i, v in enumerate(value, 1)]
            plain = origin
        if isinstance(value, float) and not math.isfinite(value):
            raise self._refusal(path, value, kind)
        for names in (a.names for a in annotations if isinstance(a, OneOf)):
            if value not in names:
                raise self._refusal(path, value, kind)
        bounds = next((a for a in annotations if isinstance(a, Meta)), None)
        try:
            return msgspec.convert(value, plain if bounds is None else Annotated[plain, bounds])
        except msgspec.ValidationError:
            raise self._refusal(path, value, kind) from None

    def _section(self, raw: Any, cls: type, path: str) -> Any:
        if not isinstance(raw, Mapping):
            raise self._refusal(path, raw, cls)
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = {str(f.metadata.get("key", f.name)): f for f in dataclasses.fields(cls)}
        for key in raw:
            if key not in fields:
                raise self._unknown(key, list(fields), path, "setting")
        for key, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and key not in raw:
                expected = f.metadata.get("hint", _described(hints[f.name]))
                raise RecipeError(f"{self.source}: {_join(path, key)} is missing; expected {expected}")
        values = {fields[k].name: self.convert(v, hints[fields[k].name], _join(path, k)) for k, v in raw.items()}
        try:
            return cls(**values)
        except ValueError as error:
            raise RecipeError(f"{self.source}: {_join(path, str(error))}") from None

    def _check_key(self, key: str, kind: Any, path: str) -> None:
        plain, annotations = _unwrap(kind)
        names = next((a.names for a in annotations if isinstance(a, OneOf)), None)
        if names is None and typing.get_origin(plain) is Literal:
            names = typing.get_args(plain)
        if names is not None and key not in names:
            raise self._unknown(key, list(names), path, "name")

    def _unknown(self, key: str, known: list[str], path: str, what: str) -> RecipeError:
        name = _join(path, key)
        new = self.renamed.get(name)
        if new is not None:
            return RecipeError(f"{self.source}: {name} is called {new} now")
        elsewhere = next((s for s in self.settings if s.endswith(f".{key}")), None)
        near = nearest(key, known) or elsewhere  # a setting under the wrong heading
        suggestion = "" if near is None else f"; did you mean {near!r}?"
        listed = ", ".join(known[:MAX_LISTED]) + (", …" if len(known) > MAX_LISTED else "")
        return RecipeError(f"{self.source}: unknown {what} {name!r}: expected one of {listed}{suggestion}")

    def _refusal(self, path: str, value: Any, kind: Any) -> RecipeError:
        near = nearest(value, _names(kind), cutoff=0.45) if isinstance(value, str) else None
        suggestion = "" if near is None else f"; did you mean {near!r}?"
        return RecipeError(f"{self.source}: {path} = {_shown(value)}: expected {_described(kind)}{suggestion}")


def _setting_names(cls: Any, path: str) -> Iterator[str]:
    """Yield the dotted names of all settings of a dataclass and of those within it."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        yield _join(path, name)
        plain, _ = _unwrap(kind)
        if dataclasses.is_dataclass(plain):
            yield from _setting_names(plain, _join(path, name))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unwrap(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without ``Annotated`` and ``| None``, and its annotations; other unions stay as they are."""
    annotations: tuple[Any, ...] = ()
    while True:
        if typing.get_origin(kind) is Annotated:
            annotations += kind.__metadata__
            kind = kind.__origin__
        elif typing.get_origin(kind) in (Union, types.UnionType):
            kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
            if len(kinds) > 1:
                return kind, annotations
            kind = kinds[0]
        else:
            return kind, annotations


def _allows_none(kind: Any) -> bool:
    while typing.get_origin(kind) is Annotated:
        kind = kind.__origin__
    return types.NoneType in typing.get_args(kind)


def _names(kind: Any) -> Collection[str]:
    """Return the texts that a type allows, where it lists them."""
    plain, annotations = _unwrap(kind)
    if typing.get_origin(plain) is Literal:
        return [str(name) for name in typing.get_args(plain)]
    return next((a.names for a in annotations if isinstance(a, OneOf)), ())


def _described(kind: Any) -> str:
    """Describe what a type allows: ``a whole number of at least 1``."""
    plain, annotations = _unwrap(kind)
    names = list(_names(kind))
    if names:
        return f"{', '.join(map(repr, names[:-1]))}{' or ' if len(names) > 1 else ''}{names[-1]!r}"
    if dataclasses.is_dataclass(plain):
        return "a section"
    origin, arguments = typing.get_origin(plain), typing.get_args(plain)
    if origin is dict:
        text = f"a table whose values are each {_described(arguments[1])}"
    elif origin in (list, tuple):
        text = f"a list of which each is {_described(arguments[0])}"
    else:
        known = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        text = known.get(plain, getattr(plain, "__name__", str(plain)))
    meta = next((a for a in annotations if isinstance(a, Meta)), Meta())
    if meta.min_length == 1:
        return f"{text}, not empty" if origin is None else f"{text}, with at least one entry"
    if meta.ge is not None and meta.le is not None:
        return f"{text} from {meta.ge} to {meta.le}"
    phrases = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = [f"{word} {bound}" for name, word in phrases.items() if (bound := getattr(meta, name)) is not None]
    return f"{text} {' and '.join(bounds)}" if bounds else text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
