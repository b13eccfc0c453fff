"""Images that a family's processor refuses are one row's fault."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.rows import picture, write_jsonl
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.build import load_component
from tprl.data.custom import Custom
from tprl.data.taking import passed_over, take
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.shapes import REASON, ReadsShapes
from tprl.types import Sample


@pytest.fixture(scope="module")
def qwen() -> FrozenLVLM:
    return load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")


def about(size: tuple[int, int], mode: str = "RGB") -> Sample:
    return Sample("a/b", (Image.new(mode, size),), "What?", ("x",))


class TestRefusals:
    @pytest.mark.parametrize("size", [(1200, 4), (4, 1200), (2, 1000), (1, 300), (2001, 10)])
    def test_long_strips(self, qwen: FrozenLVLM, size: tuple[int, int]) -> None:
        refusal = qwen.refusal(about(size))
        assert refusal is not None
        assert refusal[0] == REASON
        assert (
            f"cannot read {size[0]} x {size[1]} pixels "
            "(absolute aspect ratio must be smaller than 200"
        ) in refusal[1]
        with pytest.raises(
            UserError,
            match=rf"the image of sample a/b, {size[0]} x {size[1]} pixels .*crop or pad it",
        ):
            qwen.encode([about((64, 64)), about(size)])

    @pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 50), (1999, 10)])
    def test_small_and_narrow_ones_are_read(self, qwen: FrozenLVLM, size: tuple[int, int]) -> None:
        assert qwen.refusal(about(size)) is None
        assert qwen.encode([about(size)]).visual_mask.any()

    def test_a_strip_that_would_fill_the_memory(self) -> None:
        """LLaVA-1.5's processor scales the shorter side to 336 pixels and crops afterwards."""

        class Reader(ReadsShapes):
            name = "llava"
            processor: Any = type("Processor", (), {})()

        Reader.processor.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
        assert Reader().refusal(about((60, 1))) is None
        refusal = Reader().refusal(about((3000, 1), "1"))
        assert refusal is not None
        assert "its processor would enlarge it to 336 x 1008000" in refusal[1]


def test_rows_are_counted_and_the_others_read(qwen: FrozenLVLM, tmp_path: Path) -> None:
    for number, size in enumerate([(96, 96), (1200, 4), (4, 1200), (60, 60)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": "What?", "answers": "x"} for number in range(4)]
    data = Custom("all", source=str(write_jsonl(tmp_path / "d.jsonl", rows)), max_bad_rows=0.5)
    assert passed_over(data) == ""
    data.read_by(qwen)
    assert [sample.images[0].size for sample in take(data, range(4))] == [(96, 96), (60, 60)]
    assert data.damage == {REASON: 2}
    assert passed_over(data) == f"2 damaged rows were passed over in custom/all ({REASON}: 2)"
