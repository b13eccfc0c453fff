"""FastV: after the second layer, only the visual tokens that the last token attends to."""

from jaxtyping import Float, Int
from torch import Tensor

from tprl.budget import check_keep_ratio
from tprl.cost import LMShape
from tprl.lvlm.layer_drop import LayerStage, Look, last_row_flops
from tprl.pruners.base import BasePruner
from tprl.pruners.schedules import solve


class FastVPruner(BasePruner):
    """Layers 0..K-1 run on everything; layers K.. on the visual tokens with the most attention from
    the last token.

    Source: FastV (Chen et al., arXiv 2403.06764), the rule of docs/baselines.md#fastv, written from
    its description: the mean over heads of layer K-1's softmax attention, row of the prompt's last
    token. K = 2 of 32 layers, in proportion for other depths (at least 1). Complexity O(S D) for
    one row and the keys of one layer. Survivors keep their positions, as in the reference. Ours
    differs in the budget: keep_ratio is the mean over all layers, so layers K.. keep (keep_ratio L
    - K) / (L - K), and a ratio of K / L or less is refused; in ties (lower index) and in
    recomputing that row alone instead of switching the layer to eager attention. `published=True`
    reads keep_ratio as the fraction that layers K.. keep (1 - R of the paper).
    """

    name = "fastv"
    extras: frozenset[str] = frozenset()

    def __init__(self, published: bool = False) -> None:
        self.published = published

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        """One drop before layer K.

        Raises:
            UserError: no fraction in the later layers gives this mean.
        """
        ratio = check_keep_ratio(keep_ratio)
        # K = 2 of the paper's 32 layers.
        first = max(1, round(2 * layers / 32))
        # The mean over all layers is the ratio, unless the paper's own meaning is asked for.
        keep = ratio
        if not self.published:
            keep = solve(self.name, ratio, [first], layers, lambda x: [x], 1.0)
        return (LayerStage(first, first - 1, keep),) if keep < 1 else ()

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        return look.last_row()

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return last_row_flops(lm, text + alive)
