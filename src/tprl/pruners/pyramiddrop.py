"""PyramidDrop: fewer visual tokens after every quarter of the layers."""

from jaxtyping import Float, Int
from torch import Tensor

from tprl.budget import check_keep_ratio
from tprl.cost import LMShape
from tprl.lvlm.layer_drop import LayerStage, Look, last_row_flops
from tprl.pruners.base import BasePruner
from tprl.pruners.schedules import solve


class PyramidDropPruner(BasePruner):
    """Before layers L/4, L/2 and 3L/4 the visual tokens with the least attention from the last
    token are dropped.

    Source: PyramidDrop (Xing et al., arXiv 2410.17247), the rule of docs/baselines.md#pyramiddrop,
    written from its description: queries and keys of the layer that comes next, mean over heads of
    the last instruction token's softmax attention; f, f^2, f^3 of the tokens live, f = 0.5 in the
    paper (layers 8, 16, 24 of 32). Complexity O(S D) per drop. Ours differs in the budget: f is
    solved for, so that the mean over all layers is keep_ratio, and a mean below that of the first
    quarter alone is refused; survivors keep their positions (the reference numbers them anew); ties
    go to the lower index. `published=True` takes f = 0.5 whatever the ratio.
    """

    name = "pyramiddrop"
    extras: frozenset[str] = frozenset()

    def __init__(self, published: bool = False) -> None:
        self.published = published

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        """Drops before the second, third and last quarter.

        Raises:
            UserError: no f gives this mean.
        """
        ratio = check_keep_ratio(keep_ratio)
        # First layer of each later quarter -> power of f; a shallow model has fewer of them.
        powers = {max(1, round(layers * quarter / 4)): quarter for quarter in (1, 2, 3)}
        powers = {start: power for start, power in powers.items() if start < layers}
        # The paper's f, or the one at which the mean over all layers is the ratio.
        f = 0.5
        if not self.published:

            def alive(x: float) -> list[float]:
                return [x**power for power in powers.values()]

            f = solve(self.name, ratio, [*powers], layers, alive, 1.0)
        if f >= 1:
            return ()
        return tuple(LayerStage(start, start, f**power) for start, power in powers.items())

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        return look.last_row()

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return last_row_flops(lm, text + alive)
