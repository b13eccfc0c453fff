"""Which lines a table gets."""

import pytest

from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.entries import check_regions, named_entries, with_regions
from tprl.types import Sample

SETTINGS = {"keep_ratios": [0.5], "seeds": [0]}


class Plain(Scenes):
    """Questions whose answers lie nowhere."""

    name = "plain"

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index)._replace(region=None)


def test_without_regions_the_oracle_has_no_entry(caplog: pytest.LogCaptureFixture) -> None:
    entries = named_entries(["divprune", "oracle", "oracle_dpp"], SETTINGS)
    assert [entry.name for entry in with_regions(entries, Plain("val"))] == ["keep_all", "divprune"]
    assert (
        "oracle, oracle_dpp left out of the table: the questions of plain have no regions"
        in caplog.text
    )
    with pytest.raises(
        UserError, match=r"pruner=oracle keeps .* questions of plain have none: leave"
    ):
        check_regions(entries, Plain("val"))


def test_with_regions_the_oracle_is_an_entry() -> None:
    entries = named_entries(["oracle"], SETTINGS)
    assert with_regions(entries, Scenes("val")) == entries
    check_regions(entries, Scenes("val"))
