"""Questions drawn and prepared ahead: the same as without, in the same order, with the same
faults."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.data.rows import as_text, encoded, write_jsonl
from tests.devices import HOST, Machine, device_of
from tests.stages.toy_runs import ppo

from tprl.build import load_component
from tprl.data.pope import Pope
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, evaluate
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.tprl import TPRL
from tprl.runtime.store import Record
from tprl.scoring.ahead import Ready, ahead, in_parts, questions_at_once
from tprl.scoring.scorer import Scorer, selected
from tprl.scoring.validation import Held, ServedScore, moved
from tprl.splice import splice
from tprl.types import Encoded, Prompt, TokenSelection

DATA = Scenes("val")


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=2)


@pytest.fixture
def threads(lvlm: FrozenLVLM) -> Iterator[FrozenLVLM]:
    lvlm.workers = 2
    yield lvlm
    lvlm.workers = 0


def stream(count: int, drawn: list[int] | None = None) -> Iterator[Ready]:
    for i in range(count):
        if drawn is not None:
            drawn.append(i)
        yield Ready([DATA[5 * i], DATA[5 * i + 1]])


def test_batches_come_in_order_and_encode_to_the_same(threads: FrozenLVLM) -> None:
    prepared = list(ahead(threads, stream(6)))
    assert all(batch.prepared is not None for batch in prepared)
    for batch, plain in zip(prepared, stream(6), strict=True):
        item, other = batch.encode(threads), plain.encode(threads)
        assert item.uids == other.uids
        for name in ("input_ids", "embeds", "question", "positions", "visual_at"):
            assert torch.equal(getattr(item, name), getattr(other, name))


def test_only_so_many_batches_are_drawn_ahead(threads: FrozenLVLM) -> None:
    drawn: list[int] = []
    before = threading.active_count()
    batches = ahead(threads, stream(20, drawn))
    for _ in range(3):
        next(batches)
    assert len(drawn) <= 3 + threads.workers + 1
    batches.close()
    assert threading.active_count() == before


def test_without_workers_nothing_is_prepared(lvlm: FrozenLVLM) -> None:
    drawn: list[int] = []
    batches = ahead(lvlm, stream(5, drawn))
    assert next(batches).prepared is None
    assert drawn == [0]


def test_a_fault_is_raised_when_it_is_its_turn(threads: FrozenLVLM) -> None:
    def faulty() -> Iterator[Ready]:
        yield from stream(2)
        raise UserError("row 2 has a fault")

    batches = ahead(threads, faulty())
    assert [len(next(batches).samples) for _ in range(2)] == [2, 2]
    with pytest.raises(UserError, match="row 2 has a fault"):
        next(batches)


def test_damaged_images_are_passed_over_and_named(threads: FrozenLVLM, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(12):
        image = "cut.png" if i in (4, 7) else as_text(encoded(i))
        question = {"question_id": str(i), "question": "Is there a dog?", "answer": "yes"}
        rows.append({**question, "image_source": f"{i}", "image": image, "category": "random"})
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    uids = []
    for workers in (0, 2):
        threads.workers = workers
        data = Pope(source=source, max_bad_rows=0.2)
        data.read_by(threads)
        score = ServedScore(threads, data, (0.5,), None, batch_size=3)
        uids.append([sample.uid for samples, _ in score.batches for sample in samples])
        assert data.damage == {"broken image": 2}
    assert uids[0] == uids[1]
    assert len(uids[0]) == 10
    data = Pope(source=source, max_bad_rows=0.1)
    data.read_by(threads)
    with pytest.raises(UserError, match=r"pope: row 7 has a fault \(broken image: .*cut\.png"):
        ServedScore(threads, data, (0.5,), None, batch_size=3)


def test_known_answers_are_not_prepared_again(
    threads: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, calls = Record(), []
    pruner = load_component("pruner", "uniform")
    entries = [Entry("uniform", pruner, (0.5,))]
    scorer = Scorer(threads, DATA)
    first = evaluate(scorer, DATA, entries, batch_size=2, limit=4, record=record)
    stock = type(threads).processed
    monkeypatch.setattr(
        type(threads), "processed", lambda self, samples: calls.append(1) or stock(self, samples)
    )
    assert evaluate(scorer, DATA, entries, batch_size=2, limit=4, record=record) == first
    assert calls == []


def test_the_budget_of_bytes_bounds_a_batch(lvlm: FrozenLVLM) -> None:
    assert questions_at_once(lvlm, DATA, 50) == 50
    longest = lvlm.encode([DATA[i] for i in range(4)]).attention.shape[1]
    each = longest * lvlm.width * 16  # bytes
    lvlm.working_gib = 7.5 * each / 2**30
    assert questions_at_once(lvlm, DATA, 50) == 7
    lvlm.working_gib = 1e-9
    assert questions_at_once(lvlm, DATA, 50) == 1
    lvlm.working_gib = 2.0


def test_where_memory_ends_a_batch_is_halved() -> None:
    sizes, room = list[int](), [2]

    def work(batch: Ready) -> list[str]:
        sizes.append(len(batch.samples))
        if len(batch.samples) > room[0]:
            raise torch.OutOfMemoryError
        return [sample.uid for sample in batch.samples]

    samples = [DATA[i] for i in range(5)]
    parts = in_parts(work, Ready(samples, list(range(5))), "a model")
    assert [uid for part in parts for uid in part] == [sample.uid for sample in samples]
    assert sizes == [5, 3, 2, 1, 2]
    room[0] = 0
    with pytest.raises(UserError, match=rf"a model has no memory for sample {samples[0].uid}"):
        in_parts(work, Ready(samples), "a model")


def test_where_memory_ends_half_as_many_are_spliced(
    lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, rows = lvlm.encode([DATA[0], DATA[5]]), [0, 1] * 10
    keep = encoded.rows(rows).visual_mask
    room, sizes = [6], list[int]()

    def narrow(part: Encoded, selection: TokenSelection) -> Prompt:
        sizes.append(len(part))
        if len(part) > room[0]:
            raise torch.OutOfMemoryError
        return splice(part, selection)

    monkeypatch.setattr("tprl.scoring.scorer.splice", narrow)
    parts = [at for at, _ in selected(encoded, rows, keep, 1 << 30)]
    assert sizes == [20, 10, 5, 5, 5, 5]
    assert sorted(i for at in parts for i in at) == list(range(20))
    room[0] = 0
    with pytest.raises(UserError, match=r"no memory for a single prompt of \d+ tokens"):
        list(selected(encoded, rows, keep, 1 << 30))


def test_held_encodings_leave_a_gpu_that_has_no_room_for_them(lvlm: FrozenLVLM) -> None:
    samples = [DATA[i] for i in range(4)]
    with Machine():
        encoded = moved(lvlm.encode(samples), device_of(0))
        for budget, home in ((1 << 30, device_of(0)), (1, HOST)):
            held = Held(device_of(0), budget)
            held.add(samples, encoded)
            assert held.encodings[0].embeds.device == home
            assert held[0][1].visual_mask.device == device_of(0)
            assert [part.uids for _, part in held] == [encoded.uids]
            assert held[0][1].counts == encoded.counts


@pytest.mark.slow
def test_a_policy_learns_the_same(threads: FrozenLVLM) -> None:
    weights = []
    for workers in (0, 2):
        threads.workers = workers
        torch.manual_seed(0)
        pruner = TPRL(threads.width, select="topk", width=16, layers=1, heads=2, code_width=0)
        served = ServedScore(threads, DATA, (0.3,), 2)
        sizes: dict[str, Any] = {"prompts": 4, "minibatch": 4, "keep_ratio": 0.3}
        stage = ppo(pruner, lvlm=threads, dataset=Scenes("train"), served=served, **sizes)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(stage)
        weights.append([value.clone() for value in stage.net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
