"""Settings of stage `ppo` that do not go together."""

import logging

from tprl.errors import UserError
from tprl.stages.base import Settings

log = logging.getLogger(__name__)


def check_choices(budget: str, advantage: str, group: int) -> None:
    """Refuse an unknown budget or advantage, and one that compares the episodes of a question where there is one."""
    if budget not in ("free", "lagrange", "exact_k"):
        raise UserError(f"stage.budget must be free, lagrange or exact_k, got {budget}.")
    if advantage not in ("gae", "grpo", "rloo"):
        raise UserError(f"stage.advantage must be gae, grpo or rloo, got {advantage}.")
    if advantage != "gae" and group < 2:
        raise UserError(
            f"stage.advantage={advantage} compares episodes of one question: set stage.group above {group}."
        )


def check_groups(key: str, settings: Settings) -> None:
    """Episodes of one question are compared with one another, and stay together in minibatches."""
    group, minibatch, advantage = (settings.get(name) for name in ("group", "minibatch", "advantage"))
    if advantage not in (None, "gae") and group is not None and group < 2:
        raise UserError(
            f"{key}.advantage={advantage} compares episodes of one question: set {key}.group above {group}."
        )
    if group is None or minibatch is None:
        return
    if minibatch < group:
        raise UserError(
            f"{key}.minibatch={minibatch} is smaller than {key}.group={group}, whose episodes stay together: set "
            f"{key}.minibatch={group} or a multiple of it."
        )
    if minibatch % group:
        whole = minibatch // group
        log.info("%s.minibatch=%d holds %d whole groups: %d episodes", key, minibatch, whole, whole * group)
