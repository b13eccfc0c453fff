"""What a dataset may say of itself, with the defaults of one that says nothing."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tprl.types import Dataset


class BaseDataset(Dataset):
    """Every dataset derives from it, so that nothing has to ask whether an attribute exists.

    `Dataset` is what it must do. These attributes are what scoring, stages and evaluation read of
    it; their defaults are those of questions that code makes, such as the toy's.
    """

    source: str = ""  # where the rows come from; empty: code makes them
    split: str = ""
    labelled: bool = True  # whether questions have reference answers
    max_bad_rows: float = 1.0  # share of the rows that may be damaged
    answer_tokens: int = 0  # that an answer usually needs; 0: unknown, see `scoring.lengths`
    questions_per_image: int = 1  # that follow each other
    rounds: int = 0  # how often each kind of question is asked about an image; 0: no such option

    # Cached, and not a plain property: a dataset may set them as well as compute them.
    @cached_property
    def damage(self) -> Mapping[str, int]:
        """Rows passed over so far, by reason."""
        return {}

    @cached_property
    def notes(self) -> Mapping[str, int]:
        """What was changed in rows that were read, and in how many."""
        return {}

    def read_by(self, lvlm: Any) -> None:
        """Count rows as damaged that this LVLM cannot read; called before a question is taken."""

    def reads_boxes_as(self, lvlm: Any) -> None:
        """Ask for boxes, and read them, as this LVLM writes them; called before a question is
        taken."""
