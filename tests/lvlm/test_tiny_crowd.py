"""The embedded LVLM of `crowd`: it loads, sees 256 tokens and reads its world."""

from pathlib import Path

from tprl.data.crowd import Crowd
from tprl.data.taking import take
from tprl.lvlm.llava import Llava
from tprl.lvlm.loading import find_model
from tprl.splice import keep_all, splice


def test_it_answers_most_questions_with_all_tokens() -> None:
    lvlm, dataset = Llava("tiny_crowd", name="tiny_crowd", device="cpu"), Crowd("val")
    samples = take(dataset, range(36))
    encoded = lvlm.encode(samples)
    assert encoded.visual_mask.sum(1).tolist() == [256] * 36
    answers = lvlm.answer(splice(encoded, keep_all(encoded)))
    scores = [
        dataset.score(sample, answer) for sample, answer in zip(samples, answers, strict=True)
    ]
    assert sum(scores) >= 0.7 * len(scores)


def test_it_is_small() -> None:
    files = [path for path in Path(find_model("tiny_crowd")).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * 2**20
