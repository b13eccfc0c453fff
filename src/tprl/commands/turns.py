"""`python -m src.eval mode=turns`: several questions about one image."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.setup import asked_entries, model_and_data, one_process, plain
from tprl.evaluation.evaluator import check_answers, feasible
from tprl.evaluation.results import BOUNDS
from tprl.evaluation.turns import arms_of, converse, rows_of_turns
from tprl.report.turns import write_questions, write_turns
from tprl.runtime.progress import Progress
from tprl.scoring.scorer import Scorer


def evaluate_turns_of(cfg: DictConfig, directory: Path) -> float | None:
    """Evaluate conversations, into `directory`.

    Returns:
        The accuracy of the main arm over its settings, for sweepers.

    Raises:
        UserError: bad input, or several processes.
    """
    cfg = checked(cfg, "eval")
    settings = plain(cfg)
    check_logger(settings)
    one_process("turns")
    cfg, entries, _ = asked_entries(cfg, settings)
    arms = arms_of(entries)  # refused before a model is loaded
    lvlm, dataset = model_and_data(cfg, directory, entries, cfg.split)
    check_answers(lvlm, dataset, settings["limit"])
    arms = arms_of(feasible(entries, lvlm))
    # The main arm is the first that shares a core, else the first that competes.
    competing = [arm for arm in arms if arm.name not in BOUNDS] or arms
    main = next((arm for arm in competing if 0 < arm.stays < 1), competing[0])
    how, scorer = settings["turns"], Scorer(lvlm, dataset, frozenset({"score"}))
    with Progress("turns") as tick:
        turns, towers = converse(
            scorer,
            dataset,
            arms,
            how["lengths"],
            how["equal"],
            settings["limit"],
            settings["batch_size"],
            tick,
        )
    write_questions(turns, directory)
    rows = rows_of_turns(turns, towers, lvlm.name, dataset, main.name)
    write_turns(rows, main.name, directory)
    print(f"table: {directory / 'turns.csv'}")
    whole = [row.accuracy for row in rows if row.arm == main.name and row.turn == 0]
    return sum(whole) / len(whole)
