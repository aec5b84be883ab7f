r"""Fine-tune nano on pictures or clips of your own with a LoRA, then ask the result.

    python examples/finetune_nano.py data.json finetuned/ --steps 200
    flash-vstream ask clip.mp4 "What is happening now?" --model finetuned/model

``data.json`` is in LLaVA's format, with paths relative to its folder:

    [{"image": "door.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is happening now?"},
        {"from": "gpt", "value": "A courier is at the front door."}]}]

``"video": "clip.mp4"`` works the same way, read at one frame a second. A run that was interrupted
continues from its last checkpoint when the same command is given again.
"""

import argparse
from pathlib import Path

from flash_vstream import FlashVStream, UserError
from flash_vstream.models.hub import fetch_model
from flash_vstream.train.config import Lora, StageConfig, Tune
from flash_vstream.train.media import media_encoder
from flash_vstream.train.stage import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()

    config = StageConfig(
        stage=2,
        model=options.model,
        data=({"kind": "llava", "file": options.data.name, "independent": True},),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        tune=Tune(lora=Lora(rank=16, alpha=32)),
    )
    folder = fetch_model(options.model)
    run_stage(config, folder, options.data.parent, options.output, media_encoder(folder))

    pipeline = FlashVStream.from_pretrained(str(options.output / "model"))  # the LoRA merged into the weights
    print(pipeline.ask(None, "What can you do?", max_new_tokens=32).finish().text)
    print(f"the fine-tuned model is in {options.output / 'model'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"finetune_nano: {error}") from None
