"""Vocabularies for word features, made without looking at any device's text.

From a public list of words, from a file of the operator's, or from text that ships with Python. The
words are the most frequent ones first.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fedge.schemas.errors import ConfigError
from fedge.schemas.words import Vocabulary, is_word, sentences


def most_frequent(texts: Iterable[str], words: int) -> list[str]:
    """The most frequent words of texts that nobody minds to be read, at most so many.

    Of equally frequent ones the first in the alphabet.
    """
    counts = Counter(word for text in texts for found in sentences(text) for word in found)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ordered if is_word(word)][:words]


def public_words(language: str, words: int) -> list[str]:
    """The most frequent words of a language, by the package `wordfreq` (its data end in 2021).

    Raises `ConfigError` if it is not installed or does not know the language.
    """
    try:
        from wordfreq import top_n_list  # noqa: PLC0415 -- for few, and large
    except ImportError as error:
        raise ConfigError(
            "the public lists of words come from the package wordfreq: "
            "pip install 'fedge[keyboard]'"
        ) from error
    try:
        # Some of its words are none to us (numbers, signs): twice as many are enough.
        found = top_n_list(language, 2 * words)
    except (LookupError, ValueError) as error:
        raise ConfigError(f"wordfreq knows no language {language!r}: {error}") from error
    return list(dict.fromkeys(word for word in found if is_word(word)))[:words]


def read_words(path: Path) -> Vocabulary:
    """The vocabulary in a file of one word a line. Raises `ConfigError` naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the vocabulary {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not is_word(line):
            raise ConfigError(
                f"{path}:{number}: {line!r} is not one lower-case word; one a line, please"
            )
    try:
        return Vocabulary(lines)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def documentation_words(words: int) -> list[str]:
    """The most frequent words in the documentation of Python's standard library."""
    return most_frequent(_documentation(), words)


def _documentation() -> Iterable[str]:
    for name in _MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
        for holder in (module, *(value for _, value in sorted(vars(module).items()))):
            if inspect.ismodule(holder) and holder is not module:
                continue
            yield inspect.getdoc(holder) or ""
            if inspect.isclass(holder):
                for _, member in sorted(vars(holder).items()):
                    yield inspect.getdoc(member) or "" if callable(member) else ""


_MODULES = ("argparse", "asyncio", "builtins", "collections", "datetime")
"""Modules that import nothing unusual and are documented well."""
