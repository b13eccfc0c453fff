"""How to serve a policy more tokens than it was trained with, chosen on validation questions."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from tprl.pruners.learned import LearnedPruner
from tprl.scoring.validation import ServedScore

log = logging.getLogger(__name__)
FADES = (0.0, 0.5, 1.0, 1.5, 2.0)


def calibrate_fade(
    pruner: LearnedPruner, served: ServedScore, trained_to: float, keep_ratios: Sequence[float]
) -> None:
    """Choose how fast relevance fades against diversity above the ratios of the training
    (`Serving.fade`).

    A policy that was trained with few tokens ranks those well. Served many, most of the budget
    would go by small differences between logits of tokens that it never had to rank; there
    diversity knows better. One exponent for all ratios: the one with the best validation
    likelihood, summed over `keep_ratios`. Nothing to choose where no DPP serves, or all of them
    were trained.

    Args:
        pruner: the policy; its `serving` is replaced.
        served: the validation questions.
        trained_to: largest keep ratio of the training.
        keep_ratios: where the policy will be served; only those above `trained_to` matter.
    """
    beyond = [ratio for ratio in keep_ratios if ratio > trained_to]
    if pruner.serving.select != "dpp" or not beyond:
        sentence = "nothing to calibrate: no DPP serves, or none of %s is above %g"
        log.info(sentence, list(keep_ratios), trained_to)
        return
    # One exponent for all ratios, so their likelihoods are summed.
    merits: dict[float, float] = {}
    for fade in FADES:
        pruner.serving = replace(pruner.serving, trained_to=trained_to, fade=fade)
        merits[fade] = sum(served.log_prob(pruner, ratio) for ratio in beyond)
    pruner.serving = replace(pruner.serving, fade=max(merits, key=merits.__getitem__))
