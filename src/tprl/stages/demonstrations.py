"""Demonstrations: what a heuristic pruner keeps, stored as masks beside one set of codes per
image."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tprl.budget import keep_top_per_image
from tprl.data.base import BaseDataset
from tprl.data.taking import batches, nothing_left
from tprl.errors import UserError
from tprl.lvlm.layer_drop import LayerPruner
from tprl.policy.networks import PolicyInput
from tprl.pruners.chunks import select_in_chunks
from tprl.pruners.learned import LearnedPruner
from tprl.rl.rollout import step_ratios
from tprl.runtime import distributed, memory
from tprl.runtime.finite import check_finite
from tprl.runtime.progress import Progress
from tprl.runtime.store import Cache, Shards, opened
from tprl.scoring.ahead import Ready, ahead, in_parts, questions_at_once
from tprl.scoring.identity import of_weights
from tprl.seeding import stable_seed
from tprl.types import LVLM, Encoded, Pruner

log = logging.getLogger(__name__)
AT_ONCE = 50  # questions that are encoded together, where memory holds as many
SHARD = 10  # batches in a file: 500 questions, of LLaVA-1.5 about 40 MB


class Demonstrations(NamedTuple):
    """Episodes of one demonstrator. `keep[t]` is alive after step t; every step keeps a subset of
    the one before."""

    x: PolicyInput  # codes and query in fp16
    keep: Bool[Tensor, "T B V"]
    keep_ratio: Float[Tensor, " B"]


class StoredDemonstrations:
    """Demonstrations in files, memory-mapped: of all the questions only a batch is ever in memory.

    A file holds, without padding and one after the other, the codes and the places of its different
    images, the embeddings of its different words, and of each question the numbers of its words and
    the masks of every schedule, as bits. Which schedule a question follows is drawn here, from
    (seed, uid): all seeds share the files.

    Args:
        paths: files that `demonstrate` has made.
        finals: final kept fraction of each schedule.
        steps: T.
        seed: of the draws.
        temporary: a folder that is deleted with this object.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        finals: Sequence[float],
        steps: int,
        seed: int,
        temporary: Any = None,
    ) -> None:
        self.paths, self.steps, self.seed, self.temporary = list(paths), steps, seed, temporary
        self.finals = torch.tensor(finals, dtype=torch.float64)
        self.widths = (0, 0)  # of codes and of words
        self._rows = torch.cat([self._read(number) for number in range(len(self.paths))])
        most = self._rows.amax(0).tolist() if len(self._rows) else [0] * len(_Row._fields)
        self._most = _Row(*most)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Demonstrations]:
        """One epoch in random order, of every batch this rank's share."""
        for index in torch.randperm(len(self), generator=generator).split(size):
            yield self.rows(distributed.share(index))

    def rows(self, index: Int[Tensor, " B"]) -> Demonstrations:
        """The questions at `index`, padded on the right to the longest of all.

        Raises:
            UserError: a file is gone or damaged.
        """
        rows = [_Row(*row) for row in self._rows[index].tolist()]
        # Question by question of a file, so that each file is opened once.
        batch = self._empty(rows)
        order = sorted(range(len(rows)), key=lambda b: rows[b].shard)
        for shard, members in groupby(order, key=lambda b: rows[b].shard):
            with opened(self.paths[shard]) as file:
                parts = _Contents(*(file.get_tensor(name) for name in _Contents._fields))
                for b in members:
                    _fill(batch, b, rows[b], parts)
        return batch

    def _read(self, number: int) -> Int[Tensor, "N 8"]:
        """A `_Row` for every question of a file."""
        with opened(self.paths[number]) as file:
            uids = json.loads(bytes(file.get_tensor("uids").tolist()))
            if uids:
                codes, vectors = file.get_slice("codes"), file.get_slice("vectors")
                self.widths = (codes.get_shape()[1], vectors.get_shape()[1])
            draws = [stable_seed(uid, self.seed) % len(self.finals) for uid in uids]
            drawn = torch.tensor(draws, dtype=torch.long)
            shard = torch.full_like(drawn, number)
            # The first two fields of a `_Row`, then those that the file holds.
            return torch.cat([torch.stack([shard, drawn], 1), file.get_tensor("rows")], 1)

    def _empty(self, rows: Sequence["_Row"]) -> Demonstrations:
        b, v, q = len(rows), self._most.tokens, self._most.words
        # Padded to the longest question of all files, so that every batch has one shape.
        x = PolicyInput(
            codes=torch.zeros(b, v, self.widths[0], dtype=torch.half),
            xy=torch.zeros(b, v, 2),
            mask=torch.zeros(b, v, dtype=torch.bool),
            query=torch.zeros(b, q, self.widths[1], dtype=torch.half),
            query_mask=torch.zeros(b, q, dtype=torch.bool),
        )
        keep = torch.zeros(self.steps, b, v, dtype=torch.bool)
        drawn = torch.tensor([row.drawn for row in rows], dtype=torch.long)
        return Demonstrations(x, keep, self.finals[drawn])


def refuse_demonstrator(pruner: Any) -> None:
    """Refuse what cannot demonstrate.

    Raises:
        UserError: it knows where the answer is, or keeps none of the tokens that it gets.
    """
    # The answer's region must not enter training, not even by way of a teacher.
    if "region" in pruner.extras:
        raise UserError(
            f"pruner={pruner.name} knows where the answer is and cannot demonstrate: use another."
        )
    how = ""
    if isinstance(pruner, LayerPruner):
        how = "drops tokens between the layers of the language model"
    elif pruner.replaces_tokens:
        how = "puts new tokens in the place of all that there are"
    if how:
        raise UserError(
            f"pruner={pruner.name} {how} and cannot demonstrate "
            "which to keep: use another, e.g. pruner=divprune."
        )


def demonstrate(
    demonstrator: Pruner,
    pruner: LearnedPruner,
    lvlm: LVLM,
    dataset: BaseDataset,
    count: int,
    keep_ratios: Sequence[float],
    steps: int,
    progressive: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Cache | None = None,
    quiet: bool = True,
) -> StoredDemonstrations:
    """Let a heuristic prune `count` training questions in `steps` steps, but for those that the
    cache has.

    Args:
        demonstrator: a pruner without access to the answer.
        pruner: the learner, whose `observe` says what is stored.
        keep_ratios: each question gets one of them, drawn from (seed, uid).
        steps: T; every step keeps the same share of what is alive.
        progressive: kept share of what is alive at each step instead, e.g. (0.8, 0.6, 0.4) as in
            the reference code; it sets both the number of steps and the final ratio.
        batch_size: questions that are encoded together; None: `AT_ONCE`, or what memory holds.
        cache: where the files stay, and what they depend on beside this pruner's codes and these
            schedules; None: in a temporary folder, for as long as the result lives.
        quiet: do not print the progress.

    Raises:
        UserError: `refuse_demonstrator`'s reasons, no question is left, or the disk is full.
    """
    refuse_demonstrator(demonstrator)
    if batch_size is None:
        batch_size = questions_at_once(lvlm, dataset, AT_ONCE)
    # Kept fractions of the original tokens after each step, for every final ratio.
    schedules = [step_ratios(ratio, steps) for ratio in keep_ratios]
    if progressive:
        schedules = [torch.tensor(progressive, dtype=torch.float64).cumprod(0).tolist()]
    # A cached folder is named by all that the files depend on; else one for this run alone.
    temporary = None
    if cache:
        codes = of_weights(pruner.autoencoder)
        folder = cache.folder(
            "demonstrations", autoencoder=codes, schedules=schedules, batch_size=batch_size
        )
    else:
        temporary = tempfile.TemporaryDirectory(prefix="tprl-", ignore_cleanup_errors=True)
        folder = Path(temporary.name)

    def work(batch: Ready) -> list[_Shown]:
        encoded = batch.encode(lvlm, demonstrator.extras)
        return _shown(demonstrator, pruner, encoded, schedules, memory.working_bytes(lvlm))

    def make_shard(first: int, stop: int) -> dict[str, Tensor]:
        records: list[_Shown] = []
        for batch in ahead(lvlm, map(Ready, batches(dataset, stop, batch_size, first))):
            for part in in_parts(work, batch, lvlm.name):
                records += part
        return _packed(records)

    # Files that exist are kept; ranks share out the missing ones.
    shards = Shards(folder, min(count or len(dataset), len(dataset)), SHARD * batch_size)
    if cache:
        log.info("%s has %d of %d demonstrations", folder, shards.done, shards.rows)
    with Progress("demonstrate", before=shards.done) as tick:
        shards.fill(make_shard, None if quiet else tick)
    finals = [schedule[-1] for schedule in schedules]
    stored = StoredDemonstrations(shards.paths, finals, len(schedules[0]), seed, temporary)
    if not len(stored):
        raise nothing_left(dataset, shards.rows, "to demonstrate")
    return stored


def _episodes(
    demonstrator: Pruner, encoded: Encoded, schedules: Sequence[Sequence[float]], budget: int
) -> Bool[Tensor, "R T B V"]:
    """Nested masks for each schedule. A heuristic's choices at two budgets need not nest, so we go
    backwards: a longer list starts from the shorter one and is filled from the choice at its own
    budget."""
    episodes = []
    for schedule in schedules:
        masks: list[Tensor] = []
        for ratio in reversed(schedule):
            mask = select_in_chunks(demonstrator, encoded, ratio, budget).keep
            # Rank 3 or 2 for what the shorter list keeps, 1 for the choice at this budget.
            if masks:
                mask = keep_top_per_image(masks[-1].float() * 2 + mask, encoded, ratio)
            masks.append(mask)
        episodes.append(torch.stack(masks[::-1]))
        assert all(bool((~later | earlier).all()) for earlier, later in pairwise(episodes[-1]))
    return torch.stack(episodes)


# --- files ----------------------------------------------------------------------------------------


class _Shown(NamedTuple):
    """A question as it is stored; R schedules of K bytes."""

    uid: str
    codes: Float[Tensor, "V Z"]
    places: Float[Tensor, "V 2"]
    words: Float[Tensor, "Q D"]
    bits: UInt8[Tensor, "R K"]


class _Contents(NamedTuple):
    """Of a file, all questions one after the other."""

    codes: Float[Tensor, "N Z"]
    places: Float[Tensor, "M 2"]
    vectors: Float[Tensor, "W D"]
    spoken: Int[Tensor, " L"]  # rows of `vectors`
    bits: UInt8[Tensor, " K"]


class _Row(NamedTuple):
    """Where a question is: its file and schedule, its visual tokens and words, and where those of
    each kind begin."""

    shard: int
    drawn: int
    tokens: int
    words: int
    codes: int
    places: int
    spoken: int
    bits: int


def _shown(
    demonstrator: Pruner,
    pruner: LearnedPruner,
    encoded: Encoded,
    schedules: Sequence[Sequence[float]],
    budget: int,
) -> list[_Shown]:
    keep = _episodes(demonstrator, encoded, schedules, budget).cpu().numpy()
    x = pruner.observe(encoded)
    # fp16 on disk: what does not fit into it must stop the run, not become infinite.
    codes, xy, query = x.codes.half().cpu(), x.xy.cpu(), x.query.half().cpu()
    # Alone, because ranks share out the files.
    check_finite(
        {"codes": codes, "question": query},
        encoded.uids,
        "demonstrations in fp16",
        alone=True,
        remedy=(
            "Demonstrations are stored in float16, up to 65504: use policy.code_width "
            "above 0, so that codes are small, or look at these samples."
        ),
    )
    records = []
    tokens, words = x.mask.sum(1).tolist(), x.query_mask.sum(1).tolist()
    for b, (n, q) in enumerate(zip(tokens, words, strict=True)):
        # [R T V] -> [R K]: the masks of a schedule as bits, step after step.
        packed = np.packbits(keep[:, :, b, :n].reshape(len(keep), -1), axis=1)
        bits = torch.from_numpy(packed)
        records.append(_Shown(encoded.uids[b], codes[b, :n], xy[b, :n], query[b, :q], bits))
    return records


def _packed(records: Sequence[_Shown]) -> dict[str, Tensor]:
    """The contents of a file."""
    # Questions about one image share its codes, and all questions share their words.
    codes, codes_at = _distinct([record.codes for record in records])
    places, places_at = _distinct([record.places for record in records])
    words = chain.from_iterable(record.words.split(1) for record in records)
    vectors, spoken = _distinct(list(words))
    # [N 6] of each question: how many tokens and words, and where each kind of content begins.
    columns = [[len(record.codes), len(record.words)] for record in records]
    counts = torch.tensor(columns, dtype=torch.long).reshape(-1, 2)
    size = torch.tensor([record.bits.numel() for record in records], dtype=torch.long)
    starts = [codes_at, places_at, counts[:, 1].cumsum(0) - counts[:, 1], size.cumsum(0) - size]
    bits = [record.bits.flatten() for record in records] or [torch.zeros(0, dtype=torch.uint8)]
    uids = json.dumps([record.uid for record in records]).encode()
    return {
        "uids": torch.tensor(list(uids), dtype=torch.uint8),
        "rows": torch.cat([counts, torch.stack(starts, 1)], 1),
        **_Contents(codes, places, vectors, spoken, torch.cat(bits))._asdict(),
    }


def _distinct(pieces: Sequence[Tensor]) -> tuple[Tensor, Int[Tensor, " N"]]:
    """Every different piece once, one after the other, and the row where each of the given ones
    begins."""
    # Bytes decide what is equal: the same image gives the same codes.
    begins: dict[bytes, int] = {}
    kept: list[Tensor] = []
    at: list[int] = []
    length = 0
    for piece in pieces:
        content = hashlib.blake2b(piece.numpy().tobytes(), digest_size=16).digest()
        if content not in begins:
            begins[content] = length
            kept.append(piece)
            length += len(piece)
        at.append(begins[content])
    return torch.cat(kept) if kept else torch.zeros(0, 0), torch.tensor(at, dtype=torch.long)


def _fill(batch: Demonstrations, b: int, row: _Row, parts: _Contents) -> None:
    """Copy a question into row b of a batch."""
    x, n, q = batch.x, row.tokens, row.words
    x.codes[b, :n] = parts.codes[row.codes : row.codes + n]
    x.xy[b, :n] = parts.places[row.places : row.places + n]
    x.query[b, :q] = parts.vectors[parts.spoken[row.spoken : row.spoken + q]]
    x.mask[b, :n] = True
    x.query_mask[b, :q] = True
    # Bits of the schedule that was drawn: all schedules of a question have the same size.
    steps = len(batch.keep)
    size = -(-steps * n // 8)
    start = row.bits + row.drawn * size
    bits = np.unpackbits(parts.bits[start : start + size].numpy(), count=steps * n)
    batch.keep[:, b, :n] = torch.from_numpy(bits.reshape(steps, n)).bool()
