"""Teaching attention where to look: an event that a question names, to the slots that show it.

Whether something happened, and when, is found by looking it up: the tokens that name an event must
find the memory's slots that show it, or find that none does. Answers teach that slowly, a bit or two
a question. Here it is taught directly: in a few layers, the attention of the last token of an
event's name is held against the temporal slots of its scene, and against the first token of the
sequence (where attention goes that looks for nothing) for streams that do not show it.

Questions that are blind to the memory are compared with every stream of the batch, the streams of
others being such as do not show them. The heads of one key group are taught; the others are free.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.llama.modeling_llama import rotate_half

GAZE = ("gaze_rows", "gaze_targets", "gaze_slots", "gaze_across")


class Looking:
    """The loss of ``layers`` of a decoder (numbers of Llama-like layers), summed over layers and heads.

    ``accuracy`` holds, for each batch since it was last emptied, the share of events whose own stream
    was looked at rightly.
    """

    def __init__(self, decoder: Any, layers: Sequence[int]):
        self.decoder = decoder
        self.layers = list(layers)
        self.accuracy: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[dict[int, Tensor]]:
        """Keeps what goes into the taught layers while the decoder runs."""
        seen: dict[int, Tensor] = {}
        hooks = [
            self.decoder.layers[number].register_forward_pre_hook(
                lambda _, inputs, number=number: seen.update({number: inputs[0]})
            )
            for number in self.layers
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def run_blind(self, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> dict[int, Tensor]:
        """What goes into the taught layers, without running those above."""
        hidden, seen = embeds, {}
        around = self.decoder.rotary_emb(embeds, position_ids=position_ids)
        for number in range(max(self.layers) + 1):
            if number in self.layers:
                seen[number] = hidden
            if number < max(self.layers):
                hidden = self.decoder.layers[number](
                    hidden, attention_mask=attention_mask, position_ids=position_ids, position_embeddings=around
                )
        return seen

    def loss(self, seen: dict[int, Tensor], position_ids: Tensor, gaze: dict[str, Tensor]) -> Tensor:
        """Cross entropy of where the events' tokens look, a mean over layers and heads."""
        cos, sin = self.decoder.rotary_emb(seen[self.layers[0]], position_ids=position_ids)
        losses, rightly = [], []
        for number in self.layers:
            scores = self._scores(self.decoder.layers[number], seen[number], cos, sin, gaze["gaze_rows"])
            found, looked = _compared(scores.float(), gaze)
            losses.append(found)
            rightly.append(looked)
        self.accuracy.append(float(torch.stack(rightly).mean()))
        return torch.stack(losses).mean()

    @staticmethod
    def _scores(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, rows: Tensor) -> Tensor:
        """Attention logits ``[n, B, h, L]`` of the events' tokens over every sequence of the batch."""
        attention = layer.self_attn
        heads = attention.num_key_value_groups  # that share the first key
        normed = layer.input_layernorm(hidden)
        width = attention.head_dim
        sequence, place = rows.unbind(1)
        keys = attention.k_proj(normed)[..., :width]
        keys = keys * cos + rotate_half(keys) * sin
        queries = attention.q_proj(normed[sequence, place]).unflatten(-1, (-1, width))[:, :heads]
        turn = cos[sequence, place][:, None], sin[sequence, place][:, None]
        queries = queries * turn[0] + rotate_half(queries) * turn[1]
        return torch.einsum("nhd,bld->nbhl", queries, keys) * attention.scaling


def _compared(scores: Tensor, gaze: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and by what share of the heads each event ``[n]`` was rightly looked for in its own stream."""
    own, slots = gaze["gaze_rows"][:, 0], gaze["gaze_slots"]
    candidates = slots.clone()
    candidates[:, 0] = True  # the first token: nothing is seen
    reach = scores.masked_fill(~candidates[None, :, None], -torch.inf).log_softmax(-1)
    nothing = reach[..., 0]  # [n, B, h]
    each = torch.arange(len(own))
    targets = gaze["gaze_targets"].clone()
    targets[~targets.any(1), 0] = True
    mass = reach[each, own].masked_fill(~targets[:, None], -torch.inf).logsumexp(-1)  # [n, h]
    loss = -mass.mean()
    if "gaze_across" in gaze and len(slots) > 1:
        others = torch.ones_like(nothing, dtype=torch.bool)
        others[each, own] = False
        loss = loss - nothing[others].mean()
    return loss, (mass.detach() > torch.tensor(0.5).log()).float().mean(1)


class LookingTrainer(Trainer):
    """A Trainer that adds the loss of looking, ``weight`` times, wherever a batch names events."""

    def __init__(self, *args: Any, looking: Looking | None = None, weight: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.looking = looking
        self.weight = weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        gaze = {name: inputs.pop(name) for name in GAZE if name in inputs}
        if not gaze or self.looking is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.compute_loss_context_manager():
            if "gaze_across" in gaze:
                wrapped: Any = model
                base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
                embeds = base.embed(inputs["input_ids"], inputs["memory_features"], inputs["abstract_frames"])
                seen = self.looking.run_blind(embeds, inputs["attention_mask"], inputs["position_ids"])
                return self.weight * self.looking.loss(seen, inputs["position_ids"], gaze)
            with self.looking.watching() as seen:
                loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + self.weight * self.looking.loss(seen, inputs["position_ids"], gaze)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.looking is not None and self.looking.accuracy:
            logs["looked_rightly"] = round(sum(self.looking.accuracy) / len(self.looking.accuracy), 4)
            self.looking.accuracy.clear()
        super().log(logs, *args, **kwargs)
