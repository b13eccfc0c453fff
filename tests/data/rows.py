"""Hand-made rows in the schema of a hub repository, and the files they come from."""

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from tprl.data.benchmark import Benchmark
from tprl.evaluation.official import OfficialScore


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Noise, another for each seed."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def encoded(seed: int = 0, size: tuple[int, int] = (24, 16)) -> dict[str, Any]:
    """The same as `datasets` stores it."""
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def as_text(image: Mapping[str, Any]) -> dict[str, Any]:
    """An encoded image as JSON can hold it."""
    return {"bytes": base64.b64encode(image["bytes"]).decode(), "path": None}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def as_hub(rows: Sequence[Mapping[str, Any]], several: bool = False) -> datasets.Dataset:
    """The rows with a real image column; `several`: a list of images in each row."""
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    return datasets.Dataset.from_list([dict(row) for row in rows]).cast_column("image", feature)


def official(
    dataset: Benchmark, predictions: Sequence[str], order: Sequence[int] = ()
) -> dict[str, float]:
    """The benchmark's own numbers for an answer to each of its questions, given in `order`, one by
    one."""
    metric = OfficialScore(dataset)
    for index in order or range(len(predictions)):
        sample = dataset[index]
        metric.update([sample.uid], [dataset.facts(sample, predictions[index])])
    return {name: float(value) for name, value in metric.compute().items()}
