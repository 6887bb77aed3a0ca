"""What counts as one typed text, when two are the same, and on which side of the split one falls.

Pure functions. They know no file and no clock, and nothing of words as a model sees them: the side
of a text must not change when a task changes its features.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from enum import StrEnum
from typing import Any

from fedge.schemas.errors import ConfigError

MAX_TEXT_CHARS = 4096
"""Longer than messages are, shorter than documents."""
ROW_BYTES = 48
"""What the store needs for a text beside the text: its row and its place in the index."""

# Control characters and the two separators of Unicode that end a line. Format characters stay:
# emoji and several scripts are written with them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class TextRefused(ConfigError):  # noqa: N818 -- the store's decision
    """A text that is not kept. `reason` says why; `index`: its place in the call, from 0."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(reason if index == 0 else f"text {index + 1}: {reason}")
        self.reason = reason
        self.index = index


class Split(StrEnum):
    """The two sides. A text that was seen on one is never seen on the other."""

    TRAINING = "training"
    HOLD_OUT = "hold_out"
    """For measuring only."""


def clean(text: str) -> str:
    """The text as it is kept: in valid Unicode, without control characters or spaces at its ends.

    Runs of control characters (line ends among them) become one space. Halves of surrogate pairs,
    which some platforms hand over, are joined; one that is alone becomes U+FFFD.

    Raises `TextRefused` if nothing is left, or more than `MAX_TEXT_CHARS`. A long text is not cut:
    it was pasted and not typed, half a sentence would be learned as if it had been written so, and
    a later `forget` of a phrase in the part that was cut would find nothing.
    """
    if not isinstance(text, str):
        raise TextRefused(f"a text is a str, not {type(text).__name__}")
    # Nothing below makes a text shorter by more than its ends, so a huge one is not worked on.
    if len(text) <= 2 * MAX_TEXT_CHARS:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = _CONTROL.sub(" ", text).strip()
    if len(text) > MAX_TEXT_CHARS:
        raise TextRefused(
            f"a text of {len(text):,} characters is too long: at most {MAX_TEXT_CHARS:,} are kept; "
            "add it sentence by sentence, or not at all if it was pasted"
        )
    if not text:
        raise TextRefused("an empty text: there is nothing to learn from it")
    return text


def normalise(text: str) -> str:
    """What two texts have in common that differ only in case, width, form or spacing.

    NFKC, case-folded, runs of white space collapsed. Normalising it again changes nothing.
    """
    # Case folding can leave the normal form, so it is made again (Unicode 15, section 3.13, D146).
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


def side_of(text: str, secret: bytes, share: float) -> Split:
    """The side of a text, from a keyed hash of what it says; `share` of all texts are held out.

    With the same `secret` and `share` the answer is the same for ever.
    """
    digest = hashlib.blake2b(normalise(text).encode(), key=secret, digest_size=8).digest()
    return Split.HOLD_OUT if int.from_bytes(digest) < share * 2**64 else Split.TRAINING


def size_bytes(text: str) -> int:
    """What a text counts towards the limit of the store: its UTF-8 and `ROW_BYTES`."""
    return len(text.encode()) + ROW_BYTES


def check_time(at: Any, now: float) -> float:
    """`at` in seconds since the epoch. Raises `TextRefused` if nothing can be typed then."""
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < 2**53:
        raise TextRefused(f"{at!r} is no time: give seconds since 1970, or nothing for now")
    if at > now + 86_400:
        raise TextRefused(
            f"the time {at} is {(at - now) / 86_400:.1f} days ahead of this device's clock; "
            "give seconds since 1970, not milliseconds"
        )
    return float(at)
