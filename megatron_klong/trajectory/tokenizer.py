"""Small tokenizers for a chat format, for data and machines without a published one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_klong.trajectory.render import ChatFormat, Piece, Text
from megatron_klong.trajectory.schema import Trajectory, initial_messages, turns

_DIGIT = re.compile(r"\d")


def trajectory_texts(trajectory: Trajectory, chat_format: ChatFormat) -> Iterator[str]:
    """Every piece of text that rendering a trajectory encodes, control tokens left out."""
    parts = turns(trajectory.messages)
    blocks: list[list[Piece]] = [
        chat_format.opening(),
        chat_format.initial(initial_messages(trajectory.messages), trajectory.tools),
    ]
    for turn in parts:
        blocks += [chat_format.action(turn.action, last=False), chat_format.answer(turn.answer)]
    for block in blocks:
        yield from block_texts(block)


def block_texts(block: Sequence[Piece]) -> Iterator[str]:
    """The texts of a block as they are encoded: neighbours as one."""
    for is_text, group in groupby(block, key=lambda piece: isinstance(piece, Text)):
        if is_text:
            yield "".join(piece.text for piece in group if isinstance(piece, Text))


def train_bpe_tokenizer(texts: Iterable[str], chat_format: ChatFormat, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text can be encoded, digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(chat_format.controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def phrase_tokenizer(texts: Iterable[str], chat_format: ChatFormat) -> Tokenizer:
    """A tokenizer for a domain of few fixed phrases: each longest text without digits is one token.

    Digits are single tokens, and so is every byte, so that other text can be encoded too. Turns
    become a handful of tokens, and a tiny model learns such a domain in minutes.
    """
    phrases = sorted({phrase for text in texts for phrase in _DIGIT.split(text) if len(phrase) > 1})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(chat_format.controls))
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that this package, transformers and vLLM can load."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
