"""`python -m src.eval mode=turns`: several questions about one image."""

from pathlib import Path

from omegaconf import DictConfig

from tprl.build import build
from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.setup import asked_entries, make_dataset, plain, start
from tprl.commands.threads import use_threads
from tprl.errors import UserError
from tprl.evaluation.entries import check_regions
from tprl.evaluation.evaluator import check_answers, check_entries, feasible
from tprl.evaluation.results import BOUNDS
from tprl.evaluation.turns import arms_of, converse, rows_of_turns
from tprl.report.turns import write_turns
from tprl.runtime import distributed
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
    if distributed.count() > 1:
        raise UserError(
            f"mode=turns answers in one process, and {distributed.count()} were started: without "
            "torchrun or srun."
        )
    cfg, entries, _ = asked_entries(cfg, settings)
    arms = arms_of(entries)  # refused before a model is loaded
    start(cfg, directory)
    lvlm = build(cfg.model)
    use_threads(cfg, directory, lvlm)
    check_entries(entries, lvlm)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    check_regions(entries, dataset)
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
    rows = rows_of_turns(turns, towers, lvlm.name, dataset, main.name)
    write_turns(rows, main.name, directory)
    print(f"table: {directory / 'turns.csv'}")
    whole = [row.accuracy for row in rows if row.arm == main.name and row.turn == 0]
    return sum(whole) / len(whole)
