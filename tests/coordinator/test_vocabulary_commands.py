"""`fedge vocabulary`: what it promises in words is what the formula says, also in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedge.coordinator.cli import cli
from fedge.coordinator.vocabulary_commands import EPSILONS, FLEETS, PUBLIC_CANDIDATES
from fedge.coordinator.word_estimates import visible_share

PAGE = (Path(__file__).parents[2] / "docs" / "vocabulary.md").read_text(encoding="utf-8")


def said(devices: int, epsilon: float) -> str:
    share = visible_share(devices, epsilon, PUBLIC_CANDIDATES)
    return "no word" if share is None else f"{100 * share:.2g}%"


@pytest.mark.parametrize("devices", FLEETS)
def test_the_help_and_the_page_say_what_a_fleet_can_see(devices):
    expected = [said(devices, epsilon) for epsilon in EPSILONS]
    result = CliRunner().invoke(cli, ["vocabulary", "collect", "--help"])
    assert result.exit_code == 0
    [line] = re.findall(rf"^ +{devices:,} +(\S.*)$", result.output, re.MULTILINE)
    assert re.split(r"  +", line) == expected
    [row] = re.findall(rf"^\| {devices:,} \| (.*) \|$", PAGE, re.MULTILINE)
    assert [re.sub(r" \(\d+\)", "", cell) for cell in row.split(" | ")] == expected


def test_the_page_is_honest_about_a_small_fleet():
    assert f"drawn by {said(98, 4.0)} of" in PAGE.replace("\n", " ")


def test_without_a_state_or_a_word_count_it_says_what_to_do(tmp_path):
    (tmp_path / "fedge.toml").write_text('population = "p"\ntask = "digits"\nstate_dir = "state"\n')
    config = ("--config", str(tmp_path / "fedge.toml"))
    result = CliRunner().invoke(cli, ["vocabulary", "collect", *config])
    assert "start `fedge serve` first" in str(result.exception)
    result = CliRunner().invoke(cli, ["vocabulary", "collect", "--epsilon", "11", *config])
    assert result.exit_code == 2
    assert "0.1<=x<=10" in result.output
