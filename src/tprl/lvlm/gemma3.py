"""Gemma 3 (SigLIP, pooled to 256 tokens; sliding windows, images that see themselves whole) on the
stock Hugging Face class, frozen."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_sides
from tprl.lvlm.blueprint import (
    SMALL_CLIP,
    SMALL_TEXT,
    byte_tokenizer,
    random_weights,
    token_ids,
)
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.gates import Gates, gates_of
from tprl.lvlm.loading import processor_parts
from tprl.lvlm.standing import ATTENTIONS, keys_of, object_layer, reading
from tprl.lvlm.towers import in_place, overheard, query_key, received_attention
from tprl.types import Encoded

ROLES = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
CHAT = (
    "{% for turn in messages %}<start_of_turn>{{ 'model' if turn.role == 'assistant' else "
    "turn.role }}\n{% for part in turn.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Gemma3(FrozenLVLM):
    """A frozen Gemma 3 of those that see; arguments as of `FrozenLVLM`.

    The tokens of an image see each other whole, and most layers see a window of the last columns.
    Both go by columns of the prompt that is read: after pruning, of the shorter one. Crops of pan
    and scan are images of their own for `tprl.prune`; `encode` asks for none.
    """

    model_type = "gemma3"
    sees = "sees images of one size"

    def __init__(self, pretrained: str | None, name: str = "gemma3", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    @property
    def shape(self) -> LVLMShape:
        config = self.model.config
        v, text = config.vision_config, LMShape.of(config.text_config)
        # The tower sees one square size, so the number of patches is part of the shape.
        vision = VisionShape(
            v.num_hidden_layers,
            v.hidden_size,
            v.intermediate_size,
            v.num_attention_heads,
            self._side**2,
            v.patch_size,
            v.num_channels,
            cls=False,
            unused=0,
            pool=getattr(v, "vision_use_head", True),
            merge=self.model.model.multi_modal_projector.kernel_size,
        )
        return LVLMShape(vision, (v.hidden_size, text.width), text)

    @property
    def _side(self) -> int:
        """Rows and columns of the patches of an image."""
        v = self.model.config.vision_config
        return v.image_size // v.patch_size

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(["<start_of_turn>", "<end_of_turn>"], **ROLES)
        image, begin, end = token_ids(tokenizer, *ROLES.values())
        # A window shorter than every prompt, so that a wrong one shows.
        text = Gemma3TextConfig(
            vocab_size=len(tokenizer),
            **SMALL_TEXT,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        )
        tower = SiglipVisionConfig(**SMALL_CLIP, image_size=48, patch_size=8)
        tower.vision_use_head = False
        # 6 x 6 patches are pooled to 3 x 3 tokens.
        config = Gemma3Config(
            vision_config=tower,
            text_config=text,
            mm_tokens_per_image=9,
            image_token_index=image,
            boi_token_index=begin,
            eoi_token_index=end,
        )
        model = Gemma3ForConditionalGeneration(config)
        # the stock class begins with a projector of zeros
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
        images = Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
        processor = Gemma3Processor(images, tokenizer, chat_template=CHAT, image_seq_length=9)
        return random_weights(model, tokenizer), processor

    @classmethod
    def load_processor(cls, source: str) -> Any:
        images, tokenizer, template = processor_parts(Gemma3Processor, source)
        # The number of tokens stands in the model's config; the processor must write as many.
        count = AutoConfig.from_pretrained(source).mm_tokens_per_image
        return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=count)

    @property
    def placeholder(self) -> str:
        """The token that begins an image: the processor writes the others after it."""
        return self.tokenizer.convert_ids_to_tokens(self.model.config.boi_token_id)

    def processor_settings(self) -> dict[str, Any]:
        return {"image_seq_length": self.model.config.mm_tokens_per_image}

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        return [self.model.config.mm_tokens_per_image] * len(pixels["pixel_values"])

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        # Checked here, where the sentence can name the images; the tower would name a shape.
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        side = self.model.config.vision_config.image_size
        check_sides(self.name, "images", values, (side, side))
        parts = self.model.model
        # The layer of the attention, and the module whose input the features are.
        layers = parts.vision_tower.encoder.layers
        middle = layers[object_layer(range(len(layers)))].self_attn
        modules = reading(extras, layers[-1].self_attn, middle, parts.multi_modal_projector)
        with overheard(modules) as calls:
            tokens = parts.get_image_features(values, return_dict=True).pooler_output
        # A token is a square of patches, and what it has of them their mean.
        features = {name: call.x for name, call in calls.items()}
        for name in ATTENTIONS & calls.keys():
            # [I P 1]: attention passes the same pooling as features, as a single channel.
            patches = received_attention(*query_key(modules[name], calls[name].x))
            features[name] = patches.unsqueeze(-1)
        if "last_keys" in calls:
            features["last_keys"] = keys_of(modules["last_keys"], calls["last_keys"].x)
        pooled = {name: self._pooled(value) for name, value in features.items()}
        for name in ATTENTIONS & pooled.keys():
            pooled[name] = pooled[name].squeeze(-1)
        # Tokens of an image form a square grid, as its patches do.
        rows = round(tokens.shape[1] ** 0.5)
        return Seen(
            list(tokens),
            [((rows, rows),)] * len(tokens),
            [((self._side, self._side),)] * len(tokens),
            {name: list(value) for name, value in pooled.items()},
        )

    def _pooled(self, patches: Float[Tensor, "I P C"]) -> Float[Tensor, "I N C"]:
        """Means over the patches of each token, as the projector takes them."""
        # [I C y x] for the stock pooling.
        grid = patches.mT.unflatten(-1, (self._side, self._side))
        return self.model.model.multi_modal_projector.avg_pool(grid).flatten(2).mT

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        """The projector behind its pooling, for methods that merge tokens before it."""
        projector = self.model.model.multi_modal_projector
        # The weight is read beside the forward, so an offloaded one must be brought in first.
        with in_place(projector):
            weight = projector.mm_input_projection_weight
            features = vision_features.to(weight.device)
            return (projector.mm_soft_emb_norm(features).to(weight.device) @ weight).to(features)

    def inputs_beside(
        self, ids: Int[Tensor, "B S1"], visual: Bool[Tensor, "B S"]
    ) -> dict[str, Shaped[Tensor, "B S1 ..."]]:
        """Images see themselves whole: runs of visual columns are an image's each, since text
        stands between any two."""
        return {"token_type_ids": pad(visual.long(), (0, ids.shape[1] - visual.shape[1]))}

    @contextmanager
    def deepstack(
        self, deep: Float[Tensor, "B S F"] | None, visual: Bool[Tensor, "B S"]
    ) -> Generator[None, None, None]:
        """Nothing is deep here. While it lasts, `generate` takes embeddings: the stock class reads
        them, but transformers judges by the signature of a method that hands them on unnamed."""
        # An attribute of the instance hides the method of the class, and is deleted afterwards.
        stock = self.model.prepare_inputs_for_generation

        # transformers looks for a parameter of this name, and for one called kwargs
        def prepare(input_ids: Tensor, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            return stock(input_ids, inputs_embeds=inputs_embeds, **kwargs)

        self.model.prepare_inputs_for_generation = prepare
        try:
            yield
        finally:
            del self.model.prepare_inputs_for_generation

    def check_gates(self) -> None:
        """Windows that a prompt fits into hide nothing: `gates` looks at each prompt."""

    def gates(
        self, encoded: Encoded, gate: Float[Tensor, "B V"], real: Bool[Tensor, "B A"]
    ) -> Gates:
        window = self.model.config.text_config.sliding_window
        length = encoded.attention.shape[1] + real.shape[1]
        if length > window:
            raise UserError(
                f"a prompt of {length} tokens is longer than the window of {window} of "
                f"{self.name}, where a gate of 0 is not pruning: use stage=lfd and stage=ppo "
                "instead of distill."
            )
        # [B S1] the image of every visual column, 0 on text; columns of one image see each other.
        image = torch.zeros(len(real), length, dtype=torch.long, device=gate.device)
        row, token = encoded.visual_mask.nonzero(as_tuple=True)
        image[row, encoded.visual_at[row, token]] = encoded.image_of[row, token] + 1
        ahead = (image.unsqueeze(2) == image.unsqueeze(1)) & (image > 0).unsqueeze(1)
        return gates_of(encoded, gate, real, ahead)

    def mask_of_layers(self, mask: Shaped[Tensor, "B 1 S1 S1"]) -> dict[str, Tensor]:
        # Both kinds of layers get one mask: the prompt fits into the window.
        return {"full_attention": mask, "sliding_attention": mask}
