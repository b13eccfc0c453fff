"""The model card of a trained pruner."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

LICENSE = "apache-2.0"


def model_card(name: str, about: Mapping[str, Any], folder: str) -> str:
    """README.md of a pruner's folder: what it was trained on, what it scored, how it is used, its
    license.

    Args:
        name: of the pruner.
        about: its `trained_on`.
        folder: what users will pass to `from_pretrained`.
    """
    # The hub links a base model by its id; a path of this machine means nothing there.
    base = about.get("pretrained")
    data = ModelCardData(
        license=LICENSE,
        library_name="tprl",
        tags=["visual-token-pruning", "vision-language", str(about.get("family", "unknown"))],
        base_model=base if base and base.count("/") == 1 and not Path(base).exists() else None,
    )
    # Front matter that the hub indexes, then what a reader wants to know first.
    stages = ", ".join(about.get("stages", [])) or "nothing yet"
    lines = [
        "---", data.to_yaml(), "---", "",
        f"# {name}: which visual tokens to keep", "",
        (
            "A policy that reads the visual tokens of an image and the question and prunes the "
            "rest before the language model reads them ([TPRL](https://arxiv.org/abs/2603.13394))."
        ), "",
        f"- LVLM: {about.get('model', 'unknown')} ({base or 'weights unknown'}, family "
        f"{about.get('family', 'unknown')}); it prunes this one only.",
        (
            f"- Trained on {about.get('dataset', 'unknown')} by the "
            f"stages {stages}; seed {about.get('seed', 'unknown')}."
        ),
        f"- License: {LICENSE}. The LVLM and the data have their own.", "",
        "## Results", "", *_table(about.get("results", [])), "",
        "## Use", "",
        "```python", "import tprl", "",
        f"pruner = tprl.Pruner.from_pretrained({json.dumps(folder)})",
        "with tprl.prune(model, pruner, keep_ratio=1 / 3):  # a stock Hugging Face model",
        "    model.generate(**processor(text=prompt, images=image, return_tensors=\"pt\"))",
        "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return ["Not evaluated."]
    # All rows are of one evaluation, so the sentence above the table is that of the first.
    first = results[0]
    lines = [
        (
            f"{first['dataset']}, {first['questions']} questions; accuracy with a 95 % "
            "bootstrap interval over images, FLOPs of the whole model relative to no pruning."
        ),
        "",
        "| pruner | keep_ratio | tokens | accuracy, % | FLOPs, % |",
        "|---|---|---|---|---|",
    ]
    # Shares as percentages; the interval stands beside the value that it is about.
    for row in results:
        low, value, high = (100 * row[key] for key in ("low", "accuracy", "high"))
        lines.append(
            f"| {row['pruner']} | {row['keep_ratio']:.3f} | {row['kept_tokens']:.1f} "
            f"| {value:.1f} [{low:.1f}, {high:.1f}] | {100 * row['flops_ratio']:.1f} |"
        )
    return lines
