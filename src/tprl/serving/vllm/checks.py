"""What is set and refused when vLLM starts to serve one of our folders."""

from typing import Any

from tprl.errors import UserError
from tprl.serving.settings import Settings

SCORING = "TPRLLlavaForScoring"  # the one class of ours whose images are embeddings
ROPES = ("default",)  # rope types that vLLM can turn with positions per axis


def prepare(model_config: Any) -> None:
    """Check a served folder, and switch on the hook that moves survivors to their places.

    Raises:
        UserError: settings or a pruner that cannot be served, or a rope that has no such hook.
    """
    settings = Settings.of(model_config.hf_config)
    settings.load(model_config.model)
    multimodal = model_config.multimodal_config
    if multimodal is None:  # every image is refused anyway: --limit-mm-per-prompt image=0
        return
    if multimodal.enable_mm_embeds and SCORING not in model_config.architectures:
        raise UserError(
            "this folder prunes images, and enable_mm_embeds would let "
            "embeddings past the pruner: serve the unpruned model to "
            "clients of tprl.serving.embeds, or leave enable_mm_embeds out."
        )
    if settings.positions == "compact":
        return
    text = model_config.hf_text_config
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ROPES:
        raise UserError(
            f"the language model turns by rope_type={rope['rope_type']}, for which "
            "vLLM keeps no positions per token kept: export with positions=compact."
        )
    rope.setdefault("mrope_section", sections(model_config.get_head_size()))
    # No video is pruned: this is what makes the runner ask for places.
    multimodal.video_pruning_rate = multimodal.video_pruning_rate or 0.5


def sections(head: int) -> list[int]:
    """Three shares of a head's angles. With three equal axes any shares are one-dimensional
    RoPE."""
    half = head // 2
    third = half // 3
    return [half - 2 * third, third, third]


def check_engine(vllm_config: Any) -> None:
    """Refuse options of the engine that read prompts behind the pruner's back.

    Raises:
        UserError: there is one.
    """
    if vllm_config.speculative_config is not None:
        raise UserError(
            "speculative decoding drafts with positions of the "
            "unpruned prompt: leave speculative_config out."
        )
