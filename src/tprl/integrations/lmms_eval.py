"""What the entry point `lmms_eval.models` loads: `python -m lmms_eval --model tprl`
(docs/lmms-eval.md)."""

from typing import Any


def manifest() -> Any:
    """The name of the model and where its class is; lmms-eval asks for it whatever model it runs,
    so this is cheap."""
    # tprl[lmms], an environment of its own
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("tprl", simple_class_path="tprl.integrations.lmms_eval_model.PrunedModel")
