"""The sizes and variants of a STAR memory."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

PARTS = ("abstract", "temporal", "retrieved", "spatial")
"""The parts of a STAR memory in the order in which the language model reads them."""

Consolidation = Literal["merge", "lloyd"]
Retrieval = Literal["exemplar", "buffer"]
Compat = Literal["none", "release"]


@dataclass(frozen=True)
class StarConfig:
    """Sizes and variants of the four parts of a STAR memory (arXiv 2406.08085, section 3 and table 5).

    A *size* P is the side of a slot's grid (P² tokens per slot), a *length* N the number of slots;
    a part of length 0 is omitted. The defaults are the paper's sizes (681 tokens) with this
    project's exact, deterministic consolidation and unlimited reach into the past:

    - ``consolidation``: ``"merge"`` merges the cheapest pair at every frame (exact streaming
      weighted k-means); ``"lloyd"`` runs Lloyd's algorithm over the clusters and the new frames.
    - ``retrieval``: ``"exemplar"`` keeps a real frame near each centroid: of every two that are merged, the nearer one;
      ``"buffer"`` searches the newest ``buffer_length`` frames, as the paper does.
    - ``compat="release"`` reproduces the authors' released code, quirks included.
    - ``longterm_length`` real frames of ``longterm_size`` are kept beside the four parts, in half precision, for a
      question to recall. The paper has no such memory, and 0 leaves it out.

    Raises ``ValueError`` for sizes that do not nest or are out of range.
    """

    spatial_size: int = 8
    temporal_size: int = 4
    abstract_size: int = 1
    spatial_length: int = 1
    temporal_length: int = 25
    abstract_length: int = 25
    retrieved_length: int = 3
    buffer_length: int = 300
    longterm_length: int = 0
    longterm_size: int = 1
    update_ratio: float = 0.2
    consolidation: Consolidation = "merge"
    retrieval: Retrieval = "exemplar"
    compat: Compat = "none"

    def __post_init__(self) -> None:
        for name in ("spatial_length", "temporal_length", "abstract_length", "retrieved_length", "longterm_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if min(self.spatial_size, self.temporal_size, self.abstract_size, self.longterm_size, self.buffer_length) < 1:
            raise ValueError("grid sizes and buffer_length must be 1 or more")
        for name in ("temporal_size", "abstract_size", "longterm_size"):
            if self.spatial_size % getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must divide spatial_size ({self.spatial_size}),"
                    " since the coarser grids are pooled from the finer"
                )
        if not 0 <= self.update_ratio <= 1:
            raise ValueError(f"update_ratio is {self.update_ratio}; it must lie between 0 and 1")
        for name, options in (("consolidation", Consolidation), ("retrieval", Retrieval), ("compat", Compat)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(get_args(options))}")
        if self.longterm_length and self.compat != "none":
            raise ValueError("compat='release' has no long-term memory; set longterm_length=0")
        if self.retrieved_length and not self.temporal_length:
            raise ValueError("retrieved_length needs a temporal memory to retrieve by; set temporal_length above 0")

    @classmethod
    def paper(cls) -> "StarConfig":
        """The paper's variant: Lloyd's algorithm, weights from cluster sizes, and the FIFO buffer.

        Writing a whole video at once clusters all its frames (the paper's offline variant).
        """
        return cls(consolidation="lloyd", retrieval="buffer")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StarConfig":
        """The config with the given fields; raises ``ValueError`` for unknown field names."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"StarConfig has no field {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)

    @property
    def max_tokens(self) -> int:
        """The number of visual tokens in a full memory (681 at the paper's sizes)."""
        return (
            self.abstract_length * self.abstract_size**2
            + self.temporal_length * self.temporal_size**2
            + (self.retrieved_length + self.spatial_length) * self.spatial_size**2
        )
