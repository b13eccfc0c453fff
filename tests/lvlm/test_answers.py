"""What answers are made of: the tokens that the chat template's assistant turn writes."""

import json

import pytest
from tests.lvlm.real import REAL, real
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tprl.build import load_component
from tprl.lvlm.answers import AnswerTurn
from tprl.lvlm.blueprint import byte_tokenizer
from tprl.types import Utterance

SPACED = (  # as SmolVLM2 writes turns: a space follows the colon, the prompt ends with the colon
    "{% for turn in messages %}{{ turn.role | capitalize }}: {% for part "
    "in turn.content %}{{ part.text }}{% endfor %}<end_of_utterance>\n{% "
    "endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LINES = (  # as Qwen's: the answer has a line of its own
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part "
    "in turn.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor "
    "%}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that puts the space before a word into the word's token, at the start of a text
    too."""
    letters = {*"▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:01"}
    vocabulary = [
        ("<unk>", 0.0),
        *((letter, -9.0) for letter in sorted(letters)),
        ("▁red", -1.0),
        ("red", -1.5),
    ]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def words(tokenizer: PreTrainedTokenizerFast, row: list[int]) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(token) for token in row]


def test_the_space_that_the_template_writes_is_part_of_the_answer() -> None:
    tokenizer = byte_tokenizer(["<end_of_utterance>"])
    end = tokenizer.get_vocab()["<end_of_utterance>"]
    turn = AnswerTurn(tokenizer, SPACED, [end], None)
    assert words(tokenizer, turn.row("red")) == ["Ġ", "r", "e", "d", "<end_of_utterance>"]
    assert words(tokenizer, turn.row(Utterance(" Red"))) == [
        "Ġ",
        "R",
        "e",
        "d",
        "<end_of_utterance>",
    ]
    # as it was written
    assert words(tokenizer, turn.row(Utterance("red"))) == ["r", "e", "d", "<end_of_utterance>"]
    # an utterance of the same letters is not remembered for it
    assert words(tokenizer, turn.row("red"))[0] == "Ġ"


def test_an_answer_on_a_line_of_its_own_begins_with_its_first_letter() -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.get_vocab()["<|im_end|>"]
    turn = AnswerTurn(tokenizer, LINES, [end, tokenizer.eos_token_id], None)
    # the end that the template writes
    assert words(tokenizer, turn.row("red")) == ["r", "e", "d", "<|im_end|>"]


def test_a_tokenizer_that_adds_a_space_itself_adds_one() -> None:
    tokenizer = pieces()
    template = SPACED.replace("<end_of_utterance>\n", " ")
    turn = AnswerTurn(tokenizer, template, [tokenizer.eos_token_id], None)
    assert words(tokenizer, turn.row("red")) == ["▁red", "</s>"]
    alone = AnswerTurn(tokenizer, None, [], "USER: {question} ASSISTANT:")
    assert words(tokenizer, alone.row("red")) == ["▁red", "</s>"]


def test_a_prompt_of_ones_own_is_followed_as_the_templates_is() -> None:
    tokenizer = byte_tokenizer(["<end_of_utterance>"])
    spaced = AnswerTurn(tokenizer, SPACED, [], "Q: {question} A:")
    assert words(tokenizer, spaced.row("red"))[:2] == ["Ġ", "r"]
    line = AnswerTurn(tokenizer, SPACED, [], "Q: {question}\nA:\n")
    assert words(tokenizer, line.row("red"))[0] == "r"


def test_words_that_a_template_puts_before_answers_are_not_answers() -> None:
    tokenizer = byte_tokenizer([])
    thinking = (
        "{% for t in messages %}{% if t.role == 'user' "
        "%}Q {{ t.content[0].text }} A:{% else %}(hm) "
    )
    thinking += "{{ t.content[0].text }}{% endif %}{% endfor %}"
    assert words(tokenizer, AnswerTurn(tokenizer, thinking, [], None).row("red"))[0] == "r"


def test_likelihood_and_length_are_of_these_tokens() -> None:
    lvlm = load_component("model", "smolvlm2", pretrained=None, dtype="float32")
    plain = lvlm.answer_length("red")
    lvlm = load_component("model", "smolvlm2", pretrained=None, dtype="float32")
    lvlm.processor.chat_template = SPACED
    assert lvlm.answer_length("red") == plain + 1
    assert lvlm.tokenizer.decode(lvlm.answer_ids(["red"])[0, :4]) == " red"


@real
@pytest.mark.parametrize(
    ("folder", "lead", "end"),
    [
        ("SmolVLM2-2.2B-Instruct", " ", "<end_of_utterance>"),
        ("llava-1.5-7b-hf", " ", "</s>"),
        ("Qwen2.5-VL-3B-Instruct", "", "<|im_end|>"),
        ("Qwen3-VL-4B-Instruct", "", "<|im_end|>"),
        ("InternVL3-1B-hf", "", "<|im_end|>"),
    ],
)
def test_published_templates(folder: str, lead: str, end: str) -> None:
    path = next(REAL.joinpath(folder).glob("chat_template.*"))
    text = path.read_text()
    template = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    tokenizer = byte_tokenizer(
        ["<end_of_utterance>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )
    ends = [tokenizer.get_vocab()[name] for name in (end, "<|endoftext|>")]
    turn = AnswerTurn(tokenizer, template, ends, None)
    assert (turn.lead, tokenizer.convert_ids_to_tokens(turn.end)) == (lead, end)
