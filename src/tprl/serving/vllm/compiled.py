"""A gap of vLLM 0.32's decoders with plain RoPE, where they are compiled."""

from typing import Any


def let_positions_have_axes(model: Any) -> None:
    """Let every compiled part of a model take positions [S] and [3 S].

    A decoder says which axis of its inputs changes its length. That of Llama, Mistral and others
    names the first one of the positions, which is that of the M-RoPE axes here: the start would
    fail, since the length were a constant. The last axis is right for both.
    """
    for part in model.modules():
        # Only compiled parts have it. Tracing reads this very object, which a class's parts share.
        axes = getattr(part, "_dynamic_arg_dims", None) or {}
        positions = axes.get("positions")
        # The axis alone, or with a name that says which others are as long.
        if positions == 0:
            axes["positions"] = -1
        elif isinstance(positions, dict) and 0 in positions:
            axes["positions"] = {-1: positions[0]}
