"""Prompt templates, and the layout of a memory in a prompt.

``render`` returns the text of a conversation, in which ``VIDEO`` marks the place of the memory.
``layout`` returns the pieces that go there: texts, and runs of visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which needs PyTorch
    from flash_vstream.memory import MemorySnapshot

VIDEO = "<image>"
"""Marks the memory's place in a prompt; the released code and LLaVA's data also use it for videos."""


@dataclass(frozen=True)
class PromptTemplate:
    """The text format of the conversations that a model was trained on.

    ``question`` and ``answer`` are format strings; ``first_question`` replaces ``question`` in the
    first turn. ``video`` separates the memory from the first question. ``stop`` ends an answer. With
    ``is_caption``, training drops the questions: an answer follows the memory at once.
    """

    name: str
    first_question: str
    question: str
    answer: str
    video: str
    stop: str
    is_caption: bool = False

    def render(self, turns: Sequence[tuple[str, str | None]], with_video: bool = True) -> str:
        """The text of ``turns`` of question and answer; a None answer leaves the prompt open for one.

        The video's mark is put before the first question unless it already contains one.
        """
        text = ""
        for i, (question, answer) in enumerate(turns):
            if i == 0 and with_video and VIDEO not in question:
                question = VIDEO + self.video + question
            text += (self.question if i else self.first_question).format(question)
            if answer is not None:
                text += self.answer.format(answer)
        return text


_V0_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe."
    "  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content."
    " Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make"
    " any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't"
    " know the answer to a question, please don't share false information."
)

TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            "vicuna_v1", _V1_SYSTEM + " USER: {} ASSISTANT:", "USER: {} ASSISTANT:", " {}</s>", "\n", "</s>"
        ),
        PromptTemplate("v0", _V0_SYSTEM + "###Human: {}###Assistant:", "Human: {}###Assistant:", " {}###", "\n", "###"),
        PromptTemplate(
            "llama_2",
            f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n{{}} [/INST]",
            "<s>[INST] {} [/INST]",
            " {} </s>",
            "\n",
            "</s>",
        ),
        PromptTemplate(
            "chatml",
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            "{}<|im_end|>\n",
            "\n",
            "<|im_end|>",
        ),
        PromptTemplate("plain", "{}", "{}", "{}\n", "", "\n", is_caption=True),
    )
}
"""The released code's templates (its models were trained with ``vicuna_v1``, after a first stage of captions with
``plain``) and ChatML.

ChatML has no system message here, since it would take up a tenth of a small model's prompt.
"""


LONGEST_STAMP_SECONDS = 10**9
"""The latest time that room is kept for in a prompt."""


def stamp(seconds: float) -> str:
    """A time as the model reads and writes it: whole seconds of stream time, such as ``"35s"``."""
    return f"{int(seconds)}s"


def layout(snapshot: "MemorySnapshot", time_stamps: bool, cue: str = "") -> list[str | int]:
    """The memory as pieces of a prompt, in reading order: texts, and counts of visual tokens.

    With ``time_stamps``, each temporal and retrieved slot is preceded by the time of its first frame,
    and each of the newest frames by ``now`` and its time. Abstract slots mix the whole stream and have
    no time. The ``cue`` for the newest frame ends the memory.
    """
    pieces: list[str | int] = []
    for name, slots in snapshot.parts():
        size = slots.features.shape[1]
        if not time_stamps or name == "abstract":
            pieces.append(len(slots) * size)
            continue
        for start in slots.start.tolist():
            pieces += [("now " if name == "spatial" else "") + stamp(start), size]
    return [*pieces, cue] if cue else pieces
