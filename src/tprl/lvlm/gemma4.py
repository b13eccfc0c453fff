"""Gemma 4 (patches pooled by their places, images of any shape; sliding windows, embeddings for
every layer, layers that share keys) on the stock Hugging Face class, frozen."""

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tprl.cost import LMShape, LVLMShape, VisionShape, unknown
from tprl.errors import UserError
from tprl.lvlm.batching import Seen, check_size
from tprl.lvlm.blueprint import SMALL_TEXT, byte_tokenizer, random_weights, token_ids
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.gemma3 import Gemma3
from tprl.lvlm.loading import WithoutVideo, module_device, processor_parts
from tprl.lvlm.standing import ATTENTIONS, keys_of, object_layer, reading
from tprl.lvlm.towers import Call, overheard, received_attention

ROLES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
CHAT = (
    "{% for turn in messages %}<|turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{% for part in turn.content %}{% if part.type == 'image' %}<|image|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
SOFT_TOKENS = (70, 140, 280, 560, 1120)  # of an image, the bounds that the stock processor takes


class ImageOnly(WithoutVideo, Gemma4Processor):
    """Images and text; nothing that hears."""


class Gemma4(Gemma3):
    """A frozen Gemma 4; arguments as of `FrozenLVLM`.

    As Gemma 3, but that images see themselves whole in windows alone, if at all, that small models
    have embeddings of words for every layer, and that an image has any shape, in at most so many
    patches: the rest of them is padding, which the tower computes too.
    """

    model_type = "gemma4"
    sees = "pads every image to one number of patches"
    bounds = frozenset({"max_pixels"})
    pixel_inputs = ("pixel_values", "image_position_ids")
    # Gates would need masks that differ by layer: refused, as other families refuse windows.
    check_gates, gates = FrozenLVLM.check_gates, FrozenLVLM.gates
    mask_of_layers = FrozenLVLM.mask_of_layers

    def __init__(self, pretrained: str | None, name: str = "gemma4", **options: Any) -> None:
        super().__init__(pretrained, name, **options)

    def _hold(self, model: Any, processor: Any, name: str) -> None:
        super()._hold(model, processor, name)
        # The stock class looks for placeholders among embeddings, by their table.
        place = model.get_input_embeddings().weight.device
        if getattr(model, "hf_device_map", None) and place != self.device:
            raise UserError(
                f"{name} compares every prompt with its word embeddings, which are on {place}, and "
                f"prompts are on {self.device}: raise model.max_memory of the first device, or set "
                "model.load_in=4bit."
            )

    @property
    def shape(self) -> LVLMShape:
        v, text = self.model.config.vision_config, LMShape.of(self.model.config.text_config)
        # Any number of patches per image; padding up to the bound is computed too, and counted.
        vision = VisionShape(
            v.num_hidden_layers,
            v.hidden_size,
            v.intermediate_size,
            v.num_attention_heads,
            patches=0,
            patch_size=v.patch_size,
            cls=False,
            unused=0,
            gated=True,
            merge=v.pooling_kernel_size,
            padded=self.processor.image_processor.max_soft_tokens * v.pooling_kernel_size**2,
        )
        # Of its own cost model: projections as wide as the tower, as in all that are published.
        if v.num_attention_heads * v.head_dim != v.hidden_size or (
            v.num_key_value_heads != v.num_attention_heads
        ):
            raise unknown("a Gemma 4 tower whose heads are not as wide as its tokens")
        return LVLMShape(vision, (v.hidden_size, text.width), text)

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        tokenizer = byte_tokenizer(["<|turn>", "<turn|>", "<|video|>"], **ROLES)
        image, begin, end, audio = token_ids(tokenizer, *list(ROLES.values())[:4])
        (video,) = token_ids(tokenizer, "<|video|>")
        # The stock class takes it by this name, and holds it as settings of single layers.
        heads: dict[str, Any] = {"global_head_dim": 16}
        # All that sizes differ in: windows, heads of full attention, layers that share keys and are
        # twice as wide, embeddings for every layer.
        text = Gemma4TextConfig(
            vocab_size=len(tokenizer),
            **{**SMALL_TEXT, "num_hidden_layers": 3},
            head_dim=12,
            **heads,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_kv_shared_layers=1,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
            use_bidirectional_attention="vision",
        )
        # Four heads of 8 are as wide as the tower, which the cost model requires.
        tower = Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=160,
        )
        config = Gemma4Config(
            text_config=text,
            vision_config=tower,
            audio_config=None,
            image_token_id=image,
            video_token_id=video,
            audio_token_id=audio,
            boi_token_id=begin,
            eoi_token_id=end,
        )
        model = Gemma4ForConditionalGeneration(config)
        assert model.model.vision_tower is not None  # the config has one
        # the stock class begins with places that are all alike
        embedder = model.model.vision_tower.patch_embedder
        torch.nn.init.normal_(embedder.position_embedding_table, std=0.05)
        images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
        processor = ImageOnly(None, images, tokenizer, None, chat_template=CHAT)
        return random_weights(model, tokenizer), processor

    @classmethod
    def load_processor(cls, source: str) -> Any:
        images, tokenizer, template = processor_parts(ImageOnly, source)
        # Sizes of the checkpoint win: a processor file may miss them or disagree.
        v = AutoConfig.from_pretrained(source).vision_config
        images.patch_size, images.pooling_kernel_size = v.patch_size, v.pooling_kernel_size
        return ImageOnly(None, images, tokenizer, None, chat_template=template)

    @property
    def placeholder(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.image_token)

    def processor_settings(self) -> dict[str, Any]:
        v = self.model.config.vision_config
        return {"patch_size": v.patch_size, "pooling_kernel_size": v.pooling_kernel_size}

    def limit_pixels(self, most: int) -> None:
        images, v = self.processor.image_processor, self.model.config.vision_config
        # The stock bound counts tokens from a fixed list: the largest that fits into the pixels.
        token = (v.patch_size * v.pooling_kernel_size) ** 2
        within = [count for count in SOFT_TOKENS if count * token <= most]
        if not within:
            raise UserError(
                f"model.max_pixels={most} is less than the {SOFT_TOKENS[0] * token} pixels of the "
                f"{SOFT_TOKENS[0]} tokens that the processor of {self.name} takes at least: give "
                "as many or more."
            )
        images.max_soft_tokens = min(images.max_soft_tokens, within[-1])

    def feature_counts(self, pixels: Mapping[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self._grids(pixels)]

    def _grids(self, pixels: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens of each image, by the last place of its patches."""
        kernel = self.model.config.vision_config.pooling_kernel_size
        # Padded patches have negative places, so the largest place is that of a real patch.
        last = torch.as_tensor(pixels["image_position_ids"]).amax(1) + 1  # [I 2], x and y
        return [(int(y) // kernel, int(x) // kernel) for x, y in last.tolist()]

    @torch.no_grad()
    def see(self, pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        values = pixels["pixel_values"].to(self.device, self.model.dtype)
        places = torch.as_tensor(pixels["image_position_ids"]).to(self.device)
        self._check_patches(values, places)
        parts, views = self.model.model, self._grids(pixels)
        layers = parts.vision_tower.encoder.layers
        middle = layers[object_layer(range(len(layers)))].self_attn
        modules = reading(extras, layers[-1].self_attn, middle, parts.embed_vision)
        with overheard(modules) as calls:
            tokens = parts.get_image_features(
                values, image_position_ids=places, return_dict=True
            ).pooler_output
        # Features are those of all images one after the other, behind the pooling; attention is by
        # patch, before it.
        counts = [rows * columns for rows, columns in views]
        features: dict[str, list[Tensor]] = {}
        if "vision_features" in calls:
            features["vision_features"] = list(calls["vision_features"].x.split(counts))
        patches: dict[str, Tensor] = {}
        for name in ATTENTIONS & calls.keys():
            patches[name] = self._attention(modules[name], calls[name], places)
        if "last_keys" in calls:
            patches["last_keys"] = keys_of(modules["last_keys"], calls["last_keys"].x)
        for name, value in patches.items():
            lines = zip(value, views, strict=True)
            features[name] = [self._by_token(line, view) for line, view in lines]
        kernel = self.model.config.vision_config.pooling_kernel_size
        # Grids in patches, for attention maps and costs; views are in tokens.
        tiles = [((rows * kernel, columns * kernel),) for rows, columns in views]
        return Seen(list(tokens), [(view,) for view in views], tiles, features)

    def _check_patches(self, values: Float[Tensor, "I P c"], places: Int[Tensor, "I P 2"]) -> None:
        """Refuse patches that the tower would misread, or could not pool."""
        v = self.model.config.vision_config
        kernel = v.pooling_kernel_size
        check_size(self.name, "patches", values.shape[-1:], [3 * v.patch_size**2], self.remedy)
        # A grid that the kernel does not divide would mix patches of two tokens.
        for columns, rows in (places.amax(1) + 1).tolist():
            if rows % kernel or columns % kernel or values.shape[1] % kernel**2:
                raise UserError(
                    f"the processor makes a grid of {rows} x {columns} patches, padded to "
                    f"{values.shape[1]}, and {self.name} pools {kernel} x {kernel} of them: "
                    f"{self.remedy}."
                )

    def _attention(
        self, layer: Any, call: Call, places: Int[Tensor, "I P 2"]
    ) -> Float[Tensor, "I P"]:
        """Attention that each patch receives."""
        # The rotation of the stock module of this layer, whatever package it came from.
        turn = sys.modules[type(layer).__module__].apply_multidimensional_rope
        cosine, sine = call.options["position_embeddings"]
        heads = []
        # [I H P c] queries and keys as the layer makes them: projected, normed, rotated.
        for project, norm in ((layer.q_proj, layer.q_norm), (layer.k_proj, layer.k_norm)):
            x = norm(project(call.x).unflatten(-1, (-1, layer.head_dim)))
            heads.append(turn(x, cosine, sine, places).transpose(1, 2))
        # The stock class does not divide by the root of a head's width.
        query, keys = heads[0] * layer.head_dim**0.5, heads[1]
        return received_attention(query, keys, (places >= 0).all(-1))

    def _by_token(
        self, patches: Float[Tensor, "P ..."], view: tuple[int, int]
    ) -> Float[Tensor, "N ..."]:
        """Means over the patches of each token; those of an image are in raster order."""
        kernel = self.model.config.vision_config.pooling_kernel_size
        real = patches[: view[0] * view[1] * kernel**2]
        # [rows k columns k] by axes; both k are averaged away.
        squares = real.unflatten(0, (view[0], kernel, view[1], kernel))
        return squares.mean((1, 3)).flatten(0, 1)

    def project(self, vision_features: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.model.model.embed_vision(inputs_embeds=vision_features)

    def inputs_beside(
        self, ids: Int[Tensor, "B S1"], visual: Bool[Tensor, "B S"]
    ) -> dict[str, Shaped[Tensor, "B S1 ..."]]:
        """Which columns are images, and what small models add to every layer, by word."""
        config = self.model.config
        # Answers behind the prompt are text.
        types = pad(visual.long(), (0, ids.shape[1] - visual.shape[1]))
        inputs: dict[str, Tensor] = {"mm_token_type_ids": types}
        # Pruning drops columns: what words add to every layer must be dropped with them.
        if config.text_config.hidden_size_per_layer_input:
            table = self.model.model.language_model.get_per_layer_inputs(self._looked_up(ids))
            inputs["per_layer_inputs"] = table.to(self.device)
        return inputs

    @contextmanager
    def deepstack(
        self, deep: Float[Tensor, "B S F"] | None, visual: Bool[Tensor, "B S"]
    ) -> Generator[None, None, None]:
        """Nothing is deep here. While it lasts, what words add to every layer goes where the stock
        class adds it to a projection of the prompt: of a model that is cut, maybe another GPU."""
        language = self.model.model.language_model

        def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (table := kwargs.get("per_layer_inputs")) is not None:
                norm = language.per_layer_projection_norm
                kwargs["per_layer_inputs"] = table.to(module_device(norm, norm.weight))
            return args, kwargs

        with super().deepstack(deep, visual):
            handle = language.register_forward_pre_hook(move, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def words(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        return super().words(self._looked_up(ids))

    def _looked_up(self, ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
        """Token ids as the stock class looks them up: placeholders as padding."""
        config = self.model.config
        marks = (config.image_token_id, config.video_token_id, config.audio_token_id)
        placeholder = torch.isin(ids, torch.tensor(marks, device=ids.device))
        return torch.where(placeholder, config.text_config.pad_token_id, ids)
