"""Settings of stage `ppo` that do not go together, and those that others leave without effect."""

import logging
from collections.abc import Mapping
from typing import Any

from tprl.build import build
from tprl.errors import UserError
from tprl.scoring.scorer import FIDELITY
from tprl.stages.base import UNCALIBRATED, Settings, Unread, serves_otherwise

CREDIT_BLOCKS = 4  # where credit is shared out and the settings do not say in how many blocks
log = logging.getLogger(__name__)


def _without_critic(settings: Settings) -> bool:
    return settings.get("advantage") in ("grpo", "rloo")


def _without_multiplier(settings: Settings) -> bool:
    return settings.get("budget") in ("free", "exact_k")


def _token_by_token(settings: Settings) -> bool:
    return settings.get("budget") in ("free", "lagrange")


def _by_sets(settings: Settings) -> bool:
    return settings.get("budget") == "exact_k"


CRITIC, MULTIPLIER = ("lr_critic", "gamma", "lam", "value_coef"), ("lr_lagrange", "lagrange_gain")
UNREAD = (
    UNCALIBRATED,
    *(Unread(option, _without_critic, "only advantage=gae has a critic") for option in CRITIC),
    *(
        Unread(option, _without_multiplier, "only budget=lagrange has a multiplier")
        for option in MULTIPLIER
    ),
    Unread("threshold_ratio", _by_sets, "budget=exact_k serves no threshold"),
    Unread("discount", _by_sets, "budget=exact_k draws sets, not token by token"),
    Unread("law", _token_by_token, "only budget=exact_k draws sets"),
    Unread("law", serves_otherwise, "only sets that policy.select=dpp serves are drawn by a law"),
    Unread(
        "calibrate",
        lambda s: s.get("budget") == "free",
        "budget=free holds the policy to no keep ratio",
    ),
)


def check_choices(budget: str, advantage: str, group: int) -> None:
    """Refuse an unknown budget or advantage, and one that compares the episodes of a question where
    there is one."""
    # Unknown words are refused before the rule about their pair.
    if budget not in ("free", "lagrange", "exact_k"):
        raise UserError(f"stage.budget must be free, lagrange or exact_k, got {budget}.")
    if advantage not in ("gae", "grpo", "rloo"):
        raise UserError(f"stage.advantage must be gae, grpo or rloo, got {advantage}.")
    _check_comparison("stage", advantage, group)


def check_groups(key: str, settings: Settings) -> None:
    """Episodes of one question are compared with one another, and stay together in minibatches."""
    group, minibatch = settings.get("group"), settings.get("minibatch")
    advantage = settings.get("advantage")
    # Incomplete settings are reported elsewhere: here only pairs are compared.
    if group is None:
        return
    _check_comparison(key, advantage, group)
    if minibatch is None:
        return
    # Groups stay together, because their episodes share one network pass.
    if minibatch < group:
        raise UserError(
            f"{key}.minibatch={minibatch} is smaller than {key}.group={group}, whose "
            f"episodes stay together: set {key}.minibatch={group} or a multiple of it."
        )
    if minibatch % group:
        whole = minibatch // group
        sentence = "%s.minibatch=%d holds %d whole groups: %d episodes"
        log.info(sentence, key, minibatch, whole, whole * group)


def _check_comparison(key: str, advantage: str | None, group: int) -> None:
    if advantage not in (None, "gae") and group < 2:
        raise UserError(
            f"{key}.advantage={advantage} compares episodes "
            f"of one question: set {key}.group above {group}."
        )


def check_credit(key: str, settings: Mapping[str, Any], select: str) -> None:
    """Refuse blocks of credit where nothing can be shared out among them; `select` is what the
    policy serves by."""
    # A single block has nothing to share with; 0 turns sharing off, and unset leaves the choice to
    # `blocks_read`.
    count = settings.get("credit_blocks")
    if count == 1:
        raise UserError(
            f"{key}.credit_blocks=1 has no other block to share the "
            "credit with: use 2 or more, or 0 for one advantage per set."
        )
    if count and not _draws_one_by_one(settings, select):
        # The sentence lists all conditions, because each of them is needed.
        options = ("budget", "law", "steps", "ratio")
        listed = ", ".join(f"{option}={settings.get(option)}" for option in options)
        raise UserError(
            f"{key}.credit_blocks={count} needs {key}.law=sequential, {key}.budget=exact_k, "
            f"{key}.steps=1, {key}.ratio=token and policy.select=dpp; got {listed} and "
            f"select={select}. Use {key}.credit_blocks=0."
        )


def check_scorer(plain: Settings) -> None:
    """Refuse rewards that an engine cannot measure; `plain` is the whole config.

    Raises:
        UserError: one needs whole distributions, of which an engine gives single likelihoods.
    """
    if plain.get("scorer") and build(plain["reward"]).needs & FIDELITY:
        raise UserError(
            "reward=fidelity compares whole distributions, and the engine of scorer=... gives "
            "likelihoods of single tokens: use reward=log_likelihood, or leave scorer out."
        )


def blocks_read(settings: Mapping[str, Any], select: str) -> int:
    """In how many blocks the best episode of a question is read again, one block less each time; 0:
    it is not.

    Args:
        settings: of the stage.
        select: what the policy serves by.
    """
    # An explicit number wins; otherwise credit is shared wherever that is possible.
    if settings.get("credit_blocks") is not None:
        return settings["credit_blocks"]
    return CREDIT_BLOCKS if _draws_one_by_one(settings, select) and settings["group"] > 1 else 0


def _draws_one_by_one(settings: Mapping[str, Any], select: str) -> bool:
    """Whether an episode is one set that is drawn token by token: then every token can have an
    advantage of its own."""
    # Any other draw has one log-probability per set, or several sets per episode.
    required = {"budget": "exact_k", "law": "sequential", "steps": 1, "ratio": "token"}
    met = [settings.get(option) == value for option, value in required.items()]
    return select == "dpp" and all(met)
