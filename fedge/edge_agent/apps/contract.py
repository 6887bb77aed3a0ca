"""What an app may ask and what it is answered, each as one model.

The same models parse what comes in, make what goes out, and give the OpenAPI description. Strict:
a number in quotes is a text, and an unknown field is an error, so that a misspelt one is noticed.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema

MAX_TEXTS = 10_000
"""In one request, which is one transaction: others wait for it."""
MAX_IDS = 100_000
MAX_COLUMNS = 65_536
MAX_TOP = 100

Moment = Annotated[FiniteFloat, Field(ge=0, description="Seconds since 1970.")]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
Ids = Annotated[
    list[Annotated[int, Field(ge=1, le=2**63 - 1)]], Field(min_length=1, max_length=MAX_IDS)
]
Row = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_COLUMNS)]


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("the bytes of an image file in base64, as a text")  # noqa: TRY004 -- pydantic's way
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64: {error}") from error


ImageFile = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class _Choice(_Model):
    """A request that says exactly one of the fields in `choices`."""

    choices: ClassVar[tuple[str, ...]]

    @model_validator(mode="after")
    def _one_is_said(self) -> Self:
        said = [name for name in self.choices if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"say exactly one of {', '.join(self.choices)}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name in cls.choices:
            schema["properties"][name].pop("default", None)
        schema["oneOf"] = [{"required": [name]} for name in cls.choices]
        return schema


# ---------------------------------------------------------------- asked


class NewExamples(_Choice):
    """Texts as they were typed: several, or one with its time."""

    choices = ("texts", "text")

    texts: Texts | SkipJsonSchema[None] = None
    text: str | SkipJsonSchema[None] = None
    at: Moment | SkipJsonSchema[None] = Field(None, description="When `text` was typed; now.")

    @model_validator(mode="after")
    def _one_text_has_one_time(self) -> Self:
        if self.at is not None and self.texts is not None:
            raise ValueError("`at` goes with `text`; `texts` were typed now")
        return self


class WhatToForget(_Choice):
    """Which examples: those with these ids, or containing a phrase, or typed before, or all."""

    choices = ("ids", "containing", "before", "all")

    ids: Ids | SkipJsonSchema[None] = None
    containing: Annotated[str, Field(min_length=1)] | SkipJsonSchema[None] = Field(
        None, description="In any case or spacing, also within words."
    )
    before: Moment | SkipJsonSchema[None] = None
    all: Literal[True] | SkipJsonSchema[None] = None


class Question(_Choice):
    """One example for the version in use: what was typed so far, an image file, or a table's row.

    Which of them the device's task takes, its answer to another one says.
    """

    choices = ("text", "image", "row")

    text: str | SkipJsonSchema[None] = Field(
        None, description="With a space or sign at its end, the next word is asked for."
    )
    image: ImageFile | SkipJsonSchema[None] = Field(
        None, description="The file: BMP, GIF, JPEG, PNG or WebP."
    )
    row: Row | SkipJsonSchema[None] = None
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 3


# ---------------------------------------------------------------- answered


class Added(_Model):
    """The ids in the order of the texts: they are on the disk. None: typed too long ago to keep."""

    ids: list[int | None]


class Forgotten(_Model):
    """How many are forgotten. `erased`: whether their bytes are gone; if not, it is tried again."""

    examples: Count
    generation: int
    erased: bool


class Side(_Model):
    """The texts to train on, or those that are only measured on. Times: seconds since 1970."""

    examples: Count
    size_bytes: Count
    oldest: float | None
    newest: float | None


class ExampleCounts(_Model):
    """How much is kept. `generation` changes with each forgetting."""

    training: Side
    hold_out: Side
    file_bytes: Count
    generation: int
    erased: bool


class Suggestion(_Model):
    """A word and its probability."""

    word: str
    probability: Probability


class Words(_Model):
    """Suggestions by falling probability. `begun`: the unfinished word that they go on from.

    `personal`: whether this device's own model answered, which it made from that version.
    """

    version: Count
    personal: bool
    words: list[Suggestion]
    begun: str


class ClassProbability(_Model):
    """A class and its probability."""

    label: str
    index: Count
    probability: Probability


class Classes(_Model):
    """The likeliest class, and the first few by falling probability. `personal`: see `Words`."""

    version: Count
    personal: bool
    label: str
    index: Count
    probabilities: list[ClassProbability]


class Values(_Model):
    """The model's numbers. `personal`: see `Words`."""

    version: Count
    personal: bool
    values: list[FiniteFloat]


class TrainingStatus(_Model):
    """What this device gives at the moment.

    `examples`: to train on, as last counted. `eligible`: whether the rules of [eligibility] and the
    limits of [participation] let it train; None where there are none. `in_the_way`: which do not.
    `round`, `stage`: of the work under way. `unsent`: updates that wait for their receipt.
    """

    examples: Count | None
    eligible: bool | None
    in_the_way: list[str]
    round: int | None
    stage: Literal["waiting", "suspended", "training", "offered"] | None
    unsent: Count


class KeptTexts(_Model):
    """How many texts of apps there are on each side."""

    training: Count
    hold_out: Count


class Status(_Model):
    """The device. `version`: in use. `newest`: heard of. `connected`: the broker is reached.

    `kept`: None while the example store cannot be read.
    """

    device: str
    population: str
    version: int | None
    newest: int | None
    connected: bool
    kept: KeptTexts | None
    training: TrainingStatus


class Problem(_Model):
    """`code` is for programs, `message` for people."""

    code: str
    message: str


class Failure(_Model):
    """The answer to what cannot be done."""

    error: Problem
