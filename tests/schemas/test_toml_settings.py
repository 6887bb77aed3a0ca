"""What a wrong configuration is told: the key as it is written, its value, and what it may be."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedge.schemas.errors import ConfigError
from fedge.schemas.ids import DeviceName
from fedge.schemas.toml_settings import read_toml


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sgd(Table):
    name: Literal["sgd"] = "sgd"
    momentum: float = 0.0


class Adam(Table):
    name: Literal["adam", "yogi"]
    beta1: float = 0.9


class Data(Table):
    limit: Annotated[int, Field(ge=1)] = 1
    columns: tuple[int | str, ...] = ()
    header: bool | Literal["auto"] = "auto"


class Settings(Table):
    device: DeviceName
    url: str | None = None
    log_format: Literal["text", "json"] = "text"
    data: Data | None = None
    optimizer: Annotated[Sgd | Adam, Field(discriminator="name")] = Sgd()

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is not None and "secret" in url:
            raise ValueError("a password never stands in a configuration")
        return url


def said(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_toml(path, Settings)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


NAMES = (
    "names have up to 63 lower-case letters, digits, '_' and '-', and begin with a letter or a "
    "digit"
)
DEVICE = 'device = "pi"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('device = "Pi Kitchen"', f"device is 'Pi Kitchen'; {NAMES}"),
        ("", "device is not set, and has no default"),
        (DEVICE + 'devise = "a"', "unknown key 'devise'; did you mean 'device'?"),
        (
            DEVICE + '[optimizer]\nname = "adam"\nmomentum = 0.9',
            "unknown key 'optimizer.momentum'; known here: beta1, name",
        ),
        (
            DEVICE + '[optimizer]\nname = "yogi"\nbeta2 = 0.9',
            "unknown key 'optimizer.beta2'; did you mean 'beta1'?",
        ),
        (
            DEVICE + '[optimizer]\nname = "adm"',
            "optimizer.name is 'adm'; it should be one of 'sgd', 'adam', 'yogi'",
        ),
        (
            DEVICE + "[optimizer]\nmomentum = 0.9",
            "optimizer.name is not set: the other keys follow it",
        ),
        (
            DEVICE + '[optimizer]\nname = "adam"\nbeta1 = "x"',
            "optimizer.beta1 is 'x'; it should be a valid number, unable to parse string as a "
            "number",
        ),
        (
            DEVICE + "[data]\nlimit = 0",
            "data.limit is 0; it should be greater than or equal to 1",
        ),
        (
            DEVICE + "[data]\ncolumns = [1, 2.5]",
            "data.columns.1 is 2.5; it should be a valid integer, got a number with a fractional "
            "part; data.columns.1 is 2.5; it should be a valid string",
        ),
        (DEVICE + "data = 3", "data: write a table, [data]"),
        (DEVICE + "[data]\nlimt = 3", "unknown key 'data.limt'; did you mean 'limit'?"),
        (DEVICE + 'log_format = "xml"', "log_format is 'xml'; it should be 'text' or 'json'"),
        (DEVICE + "log_format = true", "log_format is true; it should be 'text' or 'json'"),
        (
            DEVICE + 'url = "postgresql://me:secret@host"',
            "url: a password never stands in a configuration",
        ),
    ],
)
def test_a_wrong_key_is_named_as_it_is_written_with_what_is_allowed(tmp_path, text, expected):
    assert said(tmp_path, text) == expected


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    message = said(tmp_path, 'device = "ä"\nlog_format = "xml"\nspeed = 3')
    assert len(message.split("; ")) == 6
    assert re.search(r"device is .*log_format is .*unknown key 'speed'", message)


def test_a_long_value_is_cut(tmp_path):
    message = said(tmp_path, f'device = "{"x" * 500}"')
    assert len(message) < 200
    assert "xxx…; names have" in message
