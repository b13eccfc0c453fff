"""A task of lmms-eval made of `scenes`, and its rows as `dataset=custom` reads them: the same JSON
lines for both."""

import json
from pathlib import Path

from tprl.data.scenes import Scenes

NAME = "scenes_local"
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: !function utils.answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
UTILS = """\
from pathlib import Path

from PIL import Image


def images(doc):
    return [Image.open(Path(__file__).parent / doc["image"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def answer(doc):
    return doc["answers"][0]


def score(doc, results):
    return {"exact": float(results[0].strip().lower() == answer(doc).lower())}
"""


def write(folder: Path, scenes: int) -> Path:
    """The task on that many images, four questions each, none of which asks for a box; returns the
    file of its rows."""
    data, rows = Scenes("test"), []
    for sample in (data[i] for i in range(5 * scenes)):
        if sample.box is None:
            image = f"{sample.uid.rpartition('/')[0].replace('/', '_')}.png"
            sample.images[0].save(folder / image)
            row = {"image": image, "question": sample.question, "answers": list(sample.answers)}
            rows.append(row | {"id": sample.uid, "split": "test"})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{NAME}.yaml").write_text(YAML.format(name=NAME, rows=file))
    (folder / "utils.py").write_text(UTILS)
    return file
