"""Tokenizers and tensors for tiny models."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def char_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer of the golden files: BOS 1, EOS 2, and 3 + ord(c) % 500 for a character c."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        chr(c): 3 + c % 500 for c in range(9, 500) if chr(c).isprintable()
    }
    vocabulary["\n"] = 3 + 10
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
