"""The fast engine for CPUs: OpenVINO's PagedAttention, with sequences of any lengths in one step.

Keys and values lie in blocks of a pool. A fork shares its blocks with the sequence that it continues from, and copies
only the last one, when it writes to it; so a memory that was read once serves any number of questions.
"""

import logging
import shutil
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock

from flash_vstream.files import atomic_folder, remove_oldest
from flash_vstream.models.engines.base import CHUNK_TOKENS, Feed, Row
from flash_vstream.models.engines.openvino_graph import GROUPS, build_graph, cpu_options
from flash_vstream.models.engines.openvino_library import import_openvino
from flash_vstream.models.kept import GRAPH_FORMAT, KEPT_MODELS
from flash_vstream.models.stream_parts import StreamParts
from flash_vstream.wheels import cache_dir

FIRST_BLOCKS = 64
"""Blocks in a new pool; a pool that is full doubles."""
log = logging.getLogger("flash_vstream.models")


class PagedSequence:
    """A sequence whose keys and values lie in ``blocks`` of a pool, in order."""

    def __init__(self, blocks: list[int], length: int = 0):
        self.blocks = blocks
        self.length = length


class _Pool:
    """Blocks of keys and values of every layer, each used by any number of sequences."""

    def __init__(self, request: Any, inputs: Sequence[Any]):
        self.tensor: Any = import_openvino().Tensor
        self.request, self.inputs = request, inputs
        self.arrays: list[np.ndarray] = []
        self.users: list[int] = []  # of each block
        self.free: list[int] = []
        self.lock = threading.Lock()  # a sequence may be dropped in any thread
        self._grow()

    def take(self) -> int:
        """An unused block."""
        if not self.free:
            self._grow()
        with self.lock:
            block = self.free.pop()
            self.users[block] = 1
            return block

    def share(self, blocks: Sequence[int]) -> None:
        """Count one more user of each of ``blocks``."""
        with self.lock:
            for block in blocks:
                self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Count one user less."""
        with self.lock:
            for block in blocks:
                self.users[block] -= 1
                if self.users[block] == 0:
                    self.free.append(block)

    def own(self, block: int) -> int:
        """``block`` if it has one user, else a copy of it."""
        if self.users[block] == 1:
            return block
        copy = self.take()
        for array in self.arrays:
            array[copy] = array[block]
        self.release([block])
        return copy

    def _grow(self) -> None:
        count = max(FIRST_BLOCKS, 2 * len(self.users))
        arrays = []
        for i, place in enumerate(self.inputs):
            shape = [count, *(place.partial_shape[axis].get_length() for axis in range(1, 4))]
            array = np.zeros(shape, place.element_type.to_dtype())
            if self.arrays:
                array[: len(self.users)] = self.arrays[i]
            arrays.append(array)
            self.request.set_tensor(place, self.tensor(array, shared_memory=True))
        with self.lock:
            self.arrays = arrays
            self.free += range(count - 1, len(self.users) - 1, -1)
            self.users += [0] * (count - len(self.users))


class OpenVinoEngine:
    """Runs a model's Llama in OpenVINO; threads may share it, and take turns.

    It uses as many threads as PyTorch does. Raises ``RuntimeError`` if OpenVINO cannot run the model on this machine.
    """

    name, together = "openvino", True

    def __init__(self, model: StreamParts, compiled: Any = None):
        """``compiled`` is the model's language model as ``compile_stored`` returns it, where that was done before."""
        self.model = model
        self.graph_file: Path | None = None
        """Where the language model's graph is stored, if it was built or found here."""
        if compiled is None:
            graph, self.graph_file = _stored_graph(model.language_model)
            compiled = _compile(graph)
        self._request = compiled.create_infer_request()
        self._heads = int(model.config.text_config.num_attention_heads)
        caches = [place for place in compiled.inputs if "_cache." in place.get_any_name()]
        self._pool = _Pool(self._request, caches)
        # A block of values holds its tokens and nothing else; one of keys may hold more.
        values = next(place for place in caches if place.get_any_name().startswith("value"))
        self._block_tokens = int(values.partial_shape[2].get_length())
        self._lock = threading.Lock()

    def new_sequence(self) -> PagedSequence:
        """An empty sequence."""
        return self._sequence([], 0)

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A sequence that shares its blocks with ``sequence``."""
        with self._lock:
            self._pool.share(sequence.blocks)
            return self._sequence(list(sequence.blocks), sequence.length)

    def _sequence(self, blocks: list[int], length: int) -> PagedSequence:
        sequence = PagedSequence(blocks, length)
        weakref.finalize(sequence, self._pool.release, blocks).atexit = False
        return sequence

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> list[Row]:
        """See ``Engine.step``."""
        inputs = [self._embedded(feed) for feed in feeds]
        with self._lock:
            for i, feed in enumerate(feeds):
                while len(inputs[i]) - CHUNK_TOKENS >= feed.keep:
                    self._read([replace(feed, keep=1)], [inputs[i][:CHUNK_TOKENS]])
                    inputs[i] = inputs[i][CHUNK_TOKENS:]
            return self._read(feeds, inputs)

    def _embedded(self, feed: Feed) -> np.ndarray:
        assert feed.positions is None, "a Llama's tokens follow one another"
        features = [] if feed.features is None else [feed.features]
        embedded: np.ndarray = self.model.embed(torch.tensor([feed.ids]), features)[0].float().numpy()
        return embedded

    def _read(self, feeds: Sequence[Feed], inputs: Sequence[np.ndarray]) -> list[Row]:
        sequences: list[PagedSequence] = [feed.sequence for feed in feeds]
        past = [sequence.length for sequence in sequences]
        for sequence, new in zip(sequences, inputs, strict=True):
            self._make_room(sequence, len(new))
            sequence.length += len(new)
        ends = np.cumsum([len(new) for new in inputs])
        blocks = [sequence.blocks for sequence in sequences]
        values = {
            "inputs_embeds": np.concatenate(inputs),
            "position_ids": np.concatenate([np.arange(*span) for span in zip(past, _lengths(sequences), strict=True)]),
            "past_lens": np.array(past, np.int32),
            "subsequence_begins": np.array([0, *ends], np.int32),
            "block_indices": np.concatenate(blocks).astype(np.int32),
            "block_indices_begins": np.cumsum([0, *map(len, blocks)]).astype(np.int32),
            "max_context_len": np.array(max(_lengths(sequences)), np.int32),
            "rows": np.concatenate([np.arange(end - feed.keep, end) for feed, end in zip(feeds, ends, strict=True)]),
        }
        self._request.infer(values, share_inputs=True)
        logits = torch.from_numpy(self._request.get_tensor("logits").data.copy())
        rows = logits.split([feed.keep for feed in feeds])
        scores = torch.from_numpy(self._request.get_tensor("attention").data / self._heads)
        paid = scores.split(_lengths(sequences))
        return [Row(row, own if feed.attention else None) for feed, row, own in zip(feeds, rows, paid, strict=True)]

    def _make_room(self, sequence: PagedSequence, tokens: int) -> None:
        """Blocks for ``tokens`` more, which no other sequence writes to."""
        if sequence.length % self._block_tokens:
            sequence.blocks[-1] = self._pool.own(sequence.blocks[-1])
        while len(sequence.blocks) * self._block_tokens < sequence.length + tokens:
            sequence.blocks.append(self._pool.take())


def _lengths(sequences: Sequence[PagedSequence]) -> list[int]:
    return [sequence.length for sequence in sequences]


def compile_stored(graph: Path) -> Any:
    """A stored language model (``OpenVinoEngine.graph_file``), ready to run; raises ``RuntimeError`` if it fails."""
    return _compile(import_openvino().Core().read_model(graph))


def _compile(graph: Any) -> Any:
    """A language model's graph, ready to run, with PagedAttention and an output of the attention paid."""
    ov: Any = import_openvino()
    transformations: Any = import_openvino("_offline_transformations")
    transformations.paged_attention_transformation(graph, False, True)
    _sum_scores(graph)
    # Keys and values in 16 bits, where OpenVINO would take 8.
    options = {"KV_CACHE_PRECISION": "f16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUPS[0]}
    return ov.Core().compile_model(graph, "CPU", cpu_options() | options)


def _stored_graph(language_model: Any) -> tuple[Any, Path | None]:
    """The language model's graph from the cache, where it is put when it is first built: building takes seconds.

    With it comes its file; None if it could not be stored.
    """
    ov: Any = import_openvino()
    digest = xxhash.xxh3_128(f"{GRAPH_FORMAT} {ov.__version__} {language_model.config.to_json_string()}".encode())
    for tensor in language_model.state_dict().values():
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    folder = cache_dir() / "graphs" / digest.hexdigest()
    try:
        return ov.Core().read_model(folder / "graph.xml"), folder / "graph.xml"
    except RuntimeError:  # it is not there, or damaged
        graph = build_graph(language_model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            shutil.rmtree(folder, ignore_errors=True)
            with atomic_folder(folder) as scratch:
                ov.save_model(graph, scratch / "graph.xml", compress_to_fp16=False)
        remove_oldest(folder.parent, KEPT_MODELS)
    except (OSError, RuntimeError) as error:
        log.warning("the language model is built anew at every start, since its graph could not be stored: %s", error)
        return graph, None
    return graph, folder / "graph.xml"


def _sum_scores(graph: Any) -> None:
    """Replace every layer's output of attention scores by one output of their sum, ``attention``."""
    op: Any = import_openvino("opset13")
    results = [result for result in graph.get_results() if "logits" not in result.output(0).get_names()]
    total = results[0].input_value(0)
    for result in results[1:]:
        total = op.add(total, result.input_value(0))
    for result in results:
        graph.remove_result(result)
    attention = op.result(total)
    attention.output(0).get_tensor().set_names({"attention"})
    graph.add_results([attention])
