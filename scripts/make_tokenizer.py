"""Make the tokenizer in assets/tokenizer: byte-level BPE (arXiv 1508.07909) of the simulators' instructions.

    uv run python scripts/make_tokenizer.py

Every byte is a token, so any text in any language encodes; a sentence like those of the simulators takes about a token
a word. Case is folded, as in "Pick up" and "pick up". The result depends on which tasks the installed simulators know;
a policy that was trained with one tokenizer needs that one, which its checkpoint folder holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from embodied_rl import registry

FOLDER = Path(__file__).parents[1] / "assets" / "tokenizer"
SPECIAL = ("<pad>", "<eos>", "<bos>")
"""Ids 0, 1 and 2, as in PaliGemma's tokenizer."""
SIZE = 1024
"""Entries at most; fewer when no two of them follow each other twice."""


def instructions() -> list[str]:
    """Every instruction of the simulators, once, sorted: the order decides between merges of equal frequency."""
    return sorted({task.instruction for name in registry.simulators.names() for task in registry.tasks(name)})


def train(texts: list[str], size: int = SIZE) -> Tokenizer:
    """A tokenizer of `texts`. Digits stand alone, so that numbers share them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # a word has the same token at the beginning of a text and inside it
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Into a folder that transformers loads a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, end, begin = SPECIAL
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": end, "bos_token": begin}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    texts = instructions()
    tokenizer = train(texts)
    write(tokenizer, FOLDER)
    longest = max(len(tokenizer.encode(text).ids) for text in texts)
    print(f"{tokenizer.get_vocab_size()} entries from {len(texts)} instructions, which take {longest} tokens at most")


if __name__ == "__main__":
    main()
