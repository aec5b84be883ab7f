"""Average two adapters, to keep what the later one learned while undoing some of its forgetting.

Follows Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), applied to the
LoRA factors and the fully trained modules. Two adapters from the same training run are close enough
for this to work.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from flash_vstream.errors import UserError
from flash_vstream.train.export import WEIGHTS, load_adapter


def average_adapters(before: Path, after: Path, share: float, output: Path) -> Path:
    """Write ``share * after + (1 - share) * before`` to ``output``, with ``share`` from 0 to 1.

    Both are result folders of training stages, where ``after`` was trained starting from ``before``.
    Everything except the weights, including grounding, is copied from ``after``. Raises ``UserError``
    when the two adapters do not match.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--share {share} must lie between 0 and 1")
    if output.resolve() in (before.resolve(), after.resolve()):
        raise UserError(f"{output} is one of the two adapters; name another folder")
    first, second = load_adapter(before), load_adapter(after)
    shapes = [{name: value.shape for name, value in state.items()} for state in (first, second)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the adapters in {before} and {after} are not of one shape; one must go on from the other")
    shutil.copytree(after, output, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    mixed = {name: (1 - share) * first[name].float() + share * second[name].float() for name in second}
    save_file(mixed, output / WEIGHTS, metadata={"format": "pt"})
    return output
