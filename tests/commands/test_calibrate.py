"""`python -m src.eval mode=calibrate`, and `retention=...` after it."""

from pathlib import Path

import pytest
from tests.commands.calls import call, refused

from tprl.commands.evaluate import evaluate
from tprl.evaluation.calibration import read_calibration
from tprl.evaluation.results import read_results

TOY = ("model=toy", "dataset=toy", "logger=none", "pruner=cls_attention")
SPLIT = ("calibrate.limit=400", "calibrate.keep_ratios=[0.25]", "batch_size=200")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return call(
        "eval", evaluate, tmp_path_factory.mktemp("calibrated"), "mode=calibrate", *TOY, *SPLIT
    )


def test_a_calibration_chooses_the_ratio_of_an_evaluation(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_calibration(calibrated / "cls_attention" / "retention.json")
    assert (record.about["dataset"], record.about["split"]) == ("toy", "val")
    words = ("retention=0.9", f"calibration={calibrated}", "limit=100")
    run = call("eval", evaluate, tmp_path / "run", *TOY, *words)
    rows = read_results(run / "results.csv")
    assert {(row.pruner, row.keep_ratio) for row in rows} == {
        ("keep_all", 1.0),
        ("cls_attention", 0.25),
    }
    output = capsys.readouterr().out
    assert "cls_attention: at least 0.9 promised with confidence 0.9, 1.0000 found on 100" in output


@pytest.mark.slow
def test_a_calibration_of_another_model_is_refused(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("retention=0.9", f"calibration={calibrated}", "model.width=40")
    line = refused(capsys, "eval", tmp_path / "run", *TOY, *words)
    assert line.startswith("error: pruner cls_attention was calibrated on other weights")
