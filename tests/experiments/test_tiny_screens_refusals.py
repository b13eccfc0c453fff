"""What `tiny_screens` refuses, and how it words a question; no fonts are needed."""

from pathlib import Path

import pytest
from experiments.screens.tiny import packs
from experiments.screens.tiny.run import Plan, Run
from experiments.screens.tiny.train import Training

from tprl.errors import UserError

SMALL = {
    "vision_width": 64, "vision_layers": 3, "vision_heads": 2, "vision_ffn": 64, "width": 64,
    "layers": 4, "heads": 2, "ffn": 64, "clip_width": 16,
}  # fmt: skip


def test_questions_without_pages_are_refused_and_the_tower_is_kept(tmp_path: Path) -> None:
    training = Training(Run(tmp_path, Plan(tower_steps=0, reader_steps=1, sizes=SMALL)), None)
    with pytest.raises(
        UserError, match=r"about 50 rendered pages or more, and --pages holds 0: render more .*\.$"
    ):
        training.advance()
    assert (tmp_path / "last.ckpt").is_file()
    assert training.done == 0


def test_a_question_is_worded_as_the_prompt_says() -> None:
    assert packs.BEFORE + "<image>" + packs.BETWEEN + "{question}" + packs.AFTER == packs.PROMPT
