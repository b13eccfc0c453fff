"""What vLLM's entry point calls in every one of its processes; imports nothing heavy."""

HOME = "tprl.serving.vllm"
CLASSES = {
    "TPRLLlavaForConditionalGeneration": "llava",
    "TPRLQwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "TPRLQwen3VLForConditionalGeneration": "qwen3_vl",
    "TPRLLlavaForScoring": "scoring",  # reads embeddings with places, see there
}


def register() -> None:
    """Make our architectures known; their classes are imported when a model asks for one."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name, module in CLASSES.items():
        ModelRegistry.register_model(name, f"{HOME}.{module}:{name}")
        MODELS_CONFIG_MAP[name] = _Checks


class _Checks:
    """vLLM asks these by name when it reads a config; what they do is in `checks`."""

    @staticmethod
    def verify_and_update_model_config(model_config: object) -> None:
        from tprl.serving.vllm.checks import prepare

        prepare(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: object) -> None:
        from tprl.serving.vllm.checks import check_engine

        check_engine(vllm_config)
