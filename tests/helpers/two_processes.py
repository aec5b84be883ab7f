"""Training in two processes, which die of ``kill -9`` at their first checkpoint if they are told to."""

import os
import subprocess
import sys
from pathlib import Path

DYING = """
import os, signal, sys
from flash_vstream.train import trainer

if sys.argv[1] == "kill":
    save = trainer.StageTrainer._save_checkpoint
    def dying(self, *arguments):
        save(self, *arguments)
        self.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.StageTrainer._save_checkpoint = dying
"""


def by_two(text: str, folder: Path, how: str, *arguments: Path) -> subprocess.CompletedProcess:
    """Run a training script in two processes; with ``how`` of ``kill`` they die at the first checkpoint."""
    script = folder / "rank.py"
    script.write_text(DYING + text)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, how, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
