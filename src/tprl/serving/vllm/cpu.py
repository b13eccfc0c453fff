"""A gap of vLLM 0.32's runner for CPUs."""


def answer_for_pruning() -> None:
    """Let vLLM's CPU runner answer whether its model prunes.

    Its `load_model` replaces the GPU runner's and forgets the line that sets
    `is_multimodal_pruning_enabled`, so that places would never be asked for. Called while a model
    of ours is loaded, in the process that runs it; other platforms are left alone.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def enabled(runner: CPUModelRunner) -> bool:
        model, config = getattr(runner, "model", None), runner.model_config.multimodal_config
        return (
            supports_multimodal_pruning(model)
            and config is not None
            and config.is_multimodal_pruning_enabled()
        )

    def ignored(runner: CPUModelRunner, value: bool) -> None:
        """The GPU runner's constructor sets False."""

    CPUModelRunner.is_multimodal_pruning_enabled = property(enabled, ignored)
