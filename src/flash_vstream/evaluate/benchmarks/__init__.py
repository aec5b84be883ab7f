"""All benchmarks by name, one small module each."""

from flash_vstream.evaluate.benchmarks import (
    activitynet_qa,
    clips,
    egoschema,
    lvbench,
    mlvu,
    msrvtt_qa,
    msvd_qa,
    mvbench,
    nextqa,
    ovobench,
    streamingbench,
    videomme,
    vstream_qa,
    vstream_qa_mini,
)
from flash_vstream.evaluate.items import Benchmark

_MODULES = (
    vstream_qa,
    vstream_qa_mini,
    clips,
    activitynet_qa,
    nextqa,
    msvd_qa,
    msrvtt_qa,
    egoschema,
    mlvu,
    lvbench,
    mvbench,
    videomme,
    ovobench,
    streamingbench,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for module in _MODULES for benchmark in module.BENCHMARKS}
