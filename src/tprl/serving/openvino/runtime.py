"""Answers about images with few visual tokens: OpenVINO, numpy, Pillow and tokenizers, no torch.

python answer.py photo.png "how many objects are there?" [keep_ratio]
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from PIL import Image
from tokenizers import Tokenizer


def greedy(scores: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """Places of the k tokens that greedily maximize det(diag(q) (F F^T + 0.01 I) diag(q)), log q =
    scores / 2."""
    # As `policy.sequential`: scores are measured from the k-th largest, so that float64 holds all
    # gains.
    anchor = np.sort(scores)[-k]
    q = np.exp(np.clip(scores - anchor, -40, 40).astype(np.float64) / 2)
    # Rows of q F: the gain of a token is its squared length, and 0.01 q^2 of jitter that no step
    # removes.
    b = features.astype(np.float64) * q[:, None]
    gain, taken, factors = (b**2).sum(1) + 0.01 * q**2, [], []
    for _ in range(k):
        item = int(gain.argmax())
        # [Z] the part of this row that the chosen rows leave, by earlier steps of the Cholesky.
        u = b[item] - sum((b[item] @ h) * u for u, h in factors)
        factors.append((u, u / gain[item]))
        # Every token loses what it shares with the chosen token (Schur complement).
        gain = gain - (b @ u) * (b @ factors[-1][1])
        taken.append(item)
        gain[taken] = -math.inf
    return np.sort(taken)


def resized(image: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(width, height) of an image after the resize, the longer side rounded down as transformers
    does it."""
    if (short := size.get("shortest_edge")) is None:
        return size["width"], size["height"]
    width, height = image
    # multiplied first: 1 / 3 of 3 would be less than 1
    longer = int(short * max(image) / min(image))
    return (short, longer) if width <= height else (longer, short)


def checked_ratio(ratio: float | str) -> float:
    """A keep ratio that can be.

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    # A nan fails the comparison below, so words and bad numbers get the same sentence.
    try:
        number = float(ratio)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise ValueError(f"keep_ratio must be a number in (0, 1], got {ratio}; use e.g. 0.333.")
    return number


class Answerer:
    """A folder that `python -m src.export target=openvino` wrote. `precision` "f32" is exact,
    "bf16" faster."""

    def __init__(self, folder: str | Path, precision: str = "f32", device: str = "CPU") -> None:
        folder, core = Path(folder), ov.Core()
        self.facts = json.loads((folder / "serving.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        how = {"INFERENCE_PRECISION_HINT": precision}
        # Graphs are compiled in the order of use; only the language model keeps a state between
        # calls.
        parts = (
            core.compile_model(folder / f"{name}.xml", device, how)
            for name in ("eyes", "words", "policy", "language")
        )
        self.eyes, self.words, self.policy, language = parts
        self.language, self.kept = language.create_infer_request(), np.zeros(0, int)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[1 3 H W] as the model's image processor makes them."""
        size, crop = self.facts["size"], self.facts["crop"]
        # Resize, crop, rescale, normalize: the order of the CLIP processor in transformers.
        image = image.convert("RGB")
        image = image.resize(resized(image.size, size), Image.Resampling.BICUBIC)
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        values = (
            np.asarray(image, np.float32) / 255 - np.float32(self.facts["mean"])
        ) / np.float32(self.facts["std"])
        return values.transpose(2, 0, 1)[None].astype(np.float32)

    def select(self, tokens: np.ndarray, words: np.ndarray, ratio: float) -> np.ndarray:
        """Places of the tokens that are kept."""
        facts, (rows, columns) = self.facts, self.facts["grid"]
        # [1 N 2] centers of the patches in raster order, as fractions of the image.
        y, x = np.divmod(np.arange(rows * columns), columns)
        xy = np.stack([(x + 0.5) / columns, (y + 0.5) / rows], 1)[None].astype(np.float32)
        logits, features = self.policy([tokens, xy, words, np.array([ratio], np.float32)]).values()
        # The budget of `tprl.budget`: half is rounded up, and at least one token stays.
        k = max(1, math.floor(ratio * rows * columns + 0.5))
        # The stable sort gives ties to the lower index; places come back in raster order.
        if facts["select"] == "topk":
            return np.sort(np.argsort(-logits[0], kind="stable")[:k])
        # Above the ratios of the training, relevance fades against diversity (`Serving.fade`).
        quality = facts["quality"] * min(1.0, facts["trained_to"] / ratio) ** facts["fade"]
        return greedy(np.float32(quality) * logits[0], features[0], k)

    def __call__(
        self, image: Image.Image, question: str, ratio: float | None = None, length: int = 16
    ) -> list[int]:
        """Greedy token ids of the answer, its end included; `kept` are the places of the visual
        tokens it read.

        Raises:
            ValueError: a keep ratio outside (0, 1], or a question without words or with an image
                placeholder.
        """
        ratio = checked_ratio(self.facts["keep_ratio"] if ratio is None else ratio)
        # The question is located by characters, since its words are what the policy reads.
        before, after = self.facts["prompt"]
        line = self.tokenizer.encode(before + question + after)
        ids, span = np.array(line.ids), (len(before), len(before) + len(question))
        asked = [
            n for n, (a, b) in enumerate(line.offsets) if a < span[1] and b > span[0] and b > a
        ]
        # A placeholder in the question would count as a second image.
        if not question.strip() or (ids == self.facts["image_token"]).sum() != 1:
            raise ValueError(
                f"a question must be words without an image placeholder, got {question!r}."
            )
        # The policy sees all N tokens, the language model only those that are kept.
        tokens, words = self.eyes(self.pixels(image))[0], self.words(ids[None])[0]
        self.kept = self.select(tokens, words[:, asked], ratio)
        # The kept tokens replace the placeholder in the prompt.
        at = int(np.flatnonzero(ids == self.facts["image_token"])[0])
        embeds = np.concatenate([words[:, :at], tokens[:, self.kept], words[:, at + 1 :]], 1)
        # With positions=keep every token stands where it would stand unpruned, with gaps.
        behind = at + tokens.shape[1] + np.arange(len(ids) - at - 1)
        places = np.concatenate([np.arange(at), at + self.kept, behind])
        return self.write(
            embeds, places if self.facts["positions"] == "keep" else np.arange(len(places)), length
        )

    def write(self, embeds: np.ndarray, places: np.ndarray, length: int) -> list[int]:
        """Greedy ids after a prompt of embeddings [1 S D] at positions [S]."""
        # Keys and values of an earlier answer are forgotten.
        self.language.reset_state()
        answer: list[int] = []
        # [1 1 S S] causal mask of the prompt: the lowest number above the diagonal, 0 elsewhere.
        mask = np.triu(np.full((len(places), len(places)), np.finfo(np.float32).min), 1)[None, None]
        while len(answer) < length and (not answer or answer[-1] not in self.facts["ends"]):
            logits = self.language.infer([embeds, places[None], mask])[0]
            answer.append(int(logits[0].argmax()))
            # From here on a single token at a time, which may attend to everything before it.
            embeds, places = self.words(np.array([answer[-1:]]))[0], places[-1:] + 1
            mask = np.zeros((1, 1, 1, mask.shape[-1] + 1), np.float32)
        return answer

    def text(
        self, image: Image.Image, question: str, ratio: float | None = None, length: int = 16
    ) -> str:
        """The answer in words."""
        return self.tokenizer.decode(self(image, question, ratio, length))


def print_answer(arguments: list[str]) -> None:
    """Print the answer, or one sentence on what is wrong with the arguments."""
    if len(arguments) not in (2, 3):
        sys.exit(
            "error: give an image, a question and, if you like, "
            "a keep ratio: answer.py photo.png 'how many?' 0.2"
        )
    path, question, *more = arguments
    try:
        ratio = checked_ratio(more[0]) if more else None
        image = Image.open(path).convert("RGB")
        print(Answerer(Path(__file__).parent).text(image, question, ratio))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    print_answer(sys.argv[1:])
