"""Which model to load and how: everything that a process needs to load the same one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flash_vstream.errors import UserError

if TYPE_CHECKING:  # the command line must not wait for PyTorch
    from flash_vstream.memory import StarConfig

DTYPES = ("float32", "bfloat16", "float16")
MEMORIES = "star, recent:N, uniform:N or all"


@dataclass(frozen=True)
class ModelChoice:
    """A model and how to load it; None leaves a choice to the model and the machine.

    - ``name``: a model name, a model folder or a hub id (``ORG/MODEL`` or ``ORG/MODEL@REVISION``).
    - ``device``: a PyTorch device such as ``cpu`` or ``cuda:1``; ``dtype``: one of ``DTYPES``.
    - ``attn``: how attention is computed, such as ``sdpa`` or ``flash_attention_2``. Only ``eager`` tells what an
      answer looked at; it is the default on CPUs.
    - ``bits``: 4 or 8 to load weights quantized, by bitsandbytes or torchao.
    - ``memory``: ``star`` is the model's own memory; ``recent:N``, ``uniform:N`` and ``all`` keep frames instead.
    - ``star``: sizes of the model's memory; ``pair``: a text-image model that finds the frames that fit a question.
    - ``language_engine``: ``vllm=URL`` to let vLLM run the language model (``engines.vllm``).
    - ``compat="release"``: the memory of the authors' released code, where the model has one.

    Raises ``UserError`` for values that cannot be.
    """

    name: str
    device: str | None = None
    dtype: str | None = None
    attn: str | None = None
    bits: int | None = None
    memory: str = "star"
    star: "StarConfig | None" = None
    pair: str | None = None
    compat: str = "none"
    language_engine: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype} is unknown; choose from {', '.join(DTYPES)}")
        if self.bits not in (None, 4, 8):
            raise UserError(f"--bits is {self.bits}; weights can be loaded in 4 or 8 bits")
        if self.compat not in ("none", "release"):
            raise UserError(f"--compat is {self.compat!r}; choose from none, release")
        if self.language_engine is not None and not self.language_engine.startswith(("vllm=http://", "vllm=https://")):
            raise UserError(f"--language-engine is {self.language_engine!r}; it must be vllm=http://HOST:PORT/v1")
        method, _, count = self.memory.partition(":")
        counted = method in ("recent", "uniform") and count.isdigit() and int(count) > 0
        if not (counted or self.memory in ("star", "all")):
            raise UserError(f"no memory is called {self.memory!r}; choose from {MEMORIES}")

    @classmethod
    def of(cls, model: "str | ModelChoice") -> "ModelChoice":
        """The choice itself, or the model of that name as it comes."""
        return cls(model) if isinstance(model, str) else model

    @property
    def memory_method(self) -> tuple[str, int]:
        """The memory's method and its number of frames (0 where it has none)."""
        method, _, count = self.memory.partition(":")
        return method, int(count or 0)

    def __str__(self) -> str:
        return self.name
