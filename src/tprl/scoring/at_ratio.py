"""How questions do with what a pruner keeps of them, before the language model or between its
layers."""

from collections.abc import Sequence
from typing import Any

from tprl.budget import need_ratio
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner
from tprl.pruners.chunks import select_in_chunks
from tprl.runtime import memory
from tprl.scoring.scorer import Scored, Scorer
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Pruner, Sample, TokenSelection


def scored_at(
    scorer: Scorer,
    samples: Sequence[Sample],
    encoded: Encoded,
    pruner: Pruner | LayerPruner,
    ratio: float | None,
) -> tuple[Scored, TokenSelection, LayerPlan | None]:
    """How questions do with what a pruner keeps of them; a method between layers has a plan, and
    selects everything."""
    if isinstance(pruner, LayerPruner):
        lvlm: Any = scorer.lvlm
        plan = LayerPlan.of(pruner, need_ratio(pruner.name, ratio), lvlm.layers)
        selection = keep_all(encoded)
        return scorer(samples, splice(encoded, selection), plan=plan), selection, plan
    selection = select_in_chunks(pruner, encoded, ratio, memory.working_bytes(scorer.lvlm))
    return scorer(samples, splice(encoded, selection)), selection, None
