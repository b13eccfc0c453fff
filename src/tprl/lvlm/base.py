"""What an LVLM may say of itself, with the defaults of one that says nothing."""

from typing import Any, ClassVar

from tprl.runtime import memory
from tprl.types import LVLM


class BaseLVLM(LVLM):
    """Every LVLM derives from it, so that nothing has to ask whether an attribute exists.

    `LVLM` is what it must do. These attributes are what else data, scoring, stages and evaluation
    read of it; their defaults are those of a model without weights, such as the toy.
    """

    # the stock module and its processor; None: there is none, and calibrations go by the name
    model: Any = None
    processor: Any = None
    model_type: str = ""  # of the stock config; empty: of no family
    micro_batch: int = 64  # prompts per forward; results do not depend on it
    workers: int = 0  # threads that prepare images while the model works
    working_gib: int | float = memory.WORKING
    max_new_tokens: int = 0  # bound of a generated answer; 0: there is none
    length_is_set: bool = True  # whether `max_new_tokens` was set, or follows the dataset
    coordinates: str = ""  # how it writes boxes, a key of `data.boxes.COORDINATES`; empty: unknown
    # extras that stand in for what its encoder lacks, and what they are
    substitutes: ClassVar[dict[str, str]] = {}
    look: Any = None  # its vision side; None: it has none to count

    @property
    def identified(self) -> Any:
        """What `lvlm.recognition.model_print` tells models apart by."""
        return self if self.model is None else self.model
