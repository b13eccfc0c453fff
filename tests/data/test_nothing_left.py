"""Where every row is damaged: one sentence with the counts, wherever rows are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import picture
from tests.stages.plain import build_stage

from tprl.build import load_component
from tprl.data.custom import Custom
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, evaluate
from tprl.evaluation.pictures import gallery
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.tprl import TPRL
from tprl.scoring.scorer import Scorer
from tprl.scoring.validation import ServedScore
from tprl.stages.adapt import Adapt
from tprl.stages.autoencoder import AutoencoderStage

COUNTS = (
    r"rows of custom that were read are damaged \(empty question: 1, missing image file: 2\), "
    "so there is nothing"
)


def data(folder: Path, good: int = 0) -> Custom:
    """Three damaged rows, then good ones."""
    picture(0, (64, 32)).save(folder / "a.png")
    rows: list[dict[str, Any]] = [{"image": "x.png", "question": "q", "answers": "a"}] * 2
    rows += [{"image": "a.png", "question": "", "answers": "a"}]
    rows += [{"image": "a.png", "question": "q", "answers": "a"}] * good
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Custom("all", source=str(folder / "d.jsonl"), max_bad_rows=1.0)


def entries() -> list[Entry]:
    return [Entry("uniform", load_component("pruner", "uniform"), (0.5,))]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_an_evaluation(tmp_path: Path, batch_size: int) -> None:
    rows = data(tmp_path)
    with pytest.raises(UserError, match=f"all 3 {COUNTS} to evaluate: mend .*d.jsonl"):
        evaluate(Scorer(ToyLVLM(), rows), rows, entries(), batch_size)


def test_the_rows_of_a_limit(tmp_path: Path) -> None:
    rows = data(tmp_path, good=5)
    with pytest.raises(UserError, match=r"all 2 rows .* \(missing image file: 2\)"):
        evaluate(Scorer(ToyLVLM(), rows), rows, entries(), limit=2)
    with pytest.raises(
        UserError,
        match=r"the only row of custom that was read is damaged \(missing image file: 1\)",
    ):
        evaluate(Scorer(ToyLVLM(), data(tmp_path)), data(tmp_path), entries(), limit=1)


def test_reports_work_without_pictures(tmp_path: Path) -> None:
    rows = data(tmp_path, good=5)
    pruners = {"uniform": load_component("pruner", "uniform")}
    assert gallery(Scorer(ToyLVLM(), rows), rows, pruners, 0.5, pool=3) == []


def test_stages(tmp_path: Path) -> None:
    rows, lvlm, pruner = data(tmp_path), ToyLVLM(), TPRL(token_width=32, code_width=8)
    options: dict[str, Any] = {"pruner": pruner, "lvlm": lvlm, "dataset": rows}
    with pytest.raises(UserError, match=f"all 3 {COUNTS} to take images from"):
        build_stage(AutoencoderStage, **options, images=4).setup("fit")
    served = ServedScore(lvlm, ToyDataset("val"), [0.5], limit=4)
    adapt = build_stage(
        Adapt, **options, served=served, questions=0, budgets=[0.25, 0.5], keep_ratios=[0.3]
    )
    with pytest.raises(UserError, match=f"all 3 {COUNTS} to learn budgets from"):
        adapt.setup("fit")
