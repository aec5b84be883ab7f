"""Configuration of a Flash-VStream model: vision tower, STAR memory, projector, language model."""

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PretrainedConfig

from flash_vstream.memory import StarConfig
from flash_vstream.models.interface import VIDEO_TOKEN


class FlashVStreamConfig(PretrainedConfig):
    """A Transformers vision tower and causal language model, combined with a STAR memory.

    - ``vision_config``, ``text_config``: configs (or dicts with a ``model_type``) of these two models.
    - ``memory_config``: a ``StarConfig`` or its fields.
    - ``attention_hidden_size``: width of the semantic attention's queries and keys (32 in the released code).
    - ``vision_feature_layer``: index of the hidden state used as the feature map (-2 for the paper's
      CLIP), or None for the tower's last output.
    - ``vision_has_class_token``: whether the feature map starts with a class token, which is dropped.
    - ``pooled_size``: side of the grid to which a frame's features are first pooled (8 in the paper).
    - ``video_token_id``: the id that marks the place of a visual token in ``input_ids``; it need not be
      in the vocabulary.
    - ``time_stamps``: whether the prompt gives the time of each slot as text. The paper has no time
      stamps; without them, the model can only guess order and time from a slot's position.
    - ``grounding_config``: arguments of ``models.grounding.Grounding``; None for a model without it.
    - ``sight_config``: arguments of ``models.sight.Sight`` except ``channels``; None for a model without it. Sight
      needs grounding.
    - ``short_answers_config``: arguments of ``models.short_answers.ShortAnswers`` except the widths; likewise.
    - ``prompt_template``: a key of ``models.prompts.TEMPLATES``.

    Raises ``ValueError`` for a memory with sizes that do not nest or with unknown fields.
    """

    model_type = "flash_vstream"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        memory_config: StarConfig | dict[str, Any] | None = None,
        attention_hidden_size: int = 32,
        vision_feature_layer: int | None = -2,
        vision_has_class_token: bool = True,
        pooled_size: int = 8,
        video_token_id: int = VIDEO_TOKEN,
        time_stamps: bool = False,
        grounding_config: dict[str, Any] | None = None,
        sight_config: dict[str, Any] | None = None,
        short_answers_config: dict[str, Any] | None = None,
        prompt_template: str = "vicuna_v1",
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config(vision_config, CLIPVisionConfig)
        self.text_config = _sub_config(text_config, LlamaConfig)
        if isinstance(memory_config, dict):
            memory_config = StarConfig.from_dict(memory_config)
        # A plain dict, since configs are saved as JSON.
        self.memory_config = (memory_config or StarConfig()).to_dict()
        self.attention_hidden_size = attention_hidden_size
        self.vision_feature_layer = vision_feature_layer
        self.vision_has_class_token = vision_has_class_token
        self.pooled_size = pooled_size
        self.video_token_id = video_token_id
        self.time_stamps = time_stamps
        self.pad_token_id = pad_token_id
        self.grounding_config = grounding_config
        self.sight_config = sight_config
        self.short_answers_config = short_answers_config
        self.prompt_template = prompt_template
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def star(self) -> StarConfig:
        """The memory's sizes and variants."""
        return StarConfig.from_dict(self.memory_config)


def _sub_config(value: PretrainedConfig | dict[str, Any] | None, default: type[PretrainedConfig]) -> PretrainedConfig:
    if value is None:
        return default()
    if isinstance(value, dict):
        value = dict(value)
        return AutoConfig.for_model(value.pop("model_type"), **value)
    return value
