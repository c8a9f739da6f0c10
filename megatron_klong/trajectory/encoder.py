"""Text to token ids, with where each token begins.

Two encoders give the same ids: ``tokenizers``, and ``fastokens``, which is several times faster and has no
offsets. Offsets are not needed where every token stands for fixed bytes, as in byte-level BPE: they are the
running sum of the tokens' lengths.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers


class TextEncoder(Protocol):
    """Encodes text; the spelling of a control token in it is ordinary text."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        ...

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int64 [T], and the UTF-8 byte of the text at which each token begins, int64 [T].

        A token that begins within a letter may have that letter's first byte.
        """
        ...


class SlowEncoder:
    """``tokenizers``: the reference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and first bytes, int64 [T] each."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (letters >= 0x80) + (letters >= 0x800) + (letters >= 0x10000)
        first_byte = np.concatenate([[0], np.cumsum(sizes)])
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), first_byte[starts]


class FastEncoder:
    """``fastokens``, for byte-level tokenizers.

    Raises:
        ValueError: it does not read this tokenizer, or the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError("tokenizer: is not byte-level")
        self._encoder = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
        self._normalizer = tokenizer.normalizer
        self._slow = SlowEncoder(tokenizer)
        self._sizes = _byte_sizes(tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 [T]."""
        ids, _ = self._encoder.encode_batch_flat([text], split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4").astype(np.int64)

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and first bytes, int64 [T] each."""
        if self._normalizer is not None and self._normalizer.normalize_str(text) != text:
            return self._slow.encode_with_starts(text)  # the tokens stand for other bytes
        ids = self.encode(text)
        ends = np.cumsum(self._sizes[ids])
        if len(ids) and ends[-1] != len(text.encode()):  # a token that takes the spaces around it
            return self._slow.encode_with_starts(text)
        return ids, ends - self._sizes[ids]


def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    """The fastest encoder that is installed and reads this tokenizer."""
    if importlib.util.find_spec("fastokens") is not None:
        try:
            return FastEncoder(tokenizer)
        except ValueError:
            pass  # one of another kind
    return SlowEncoder(tokenizer)


def _byte_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes that each id stands for, int64 [vocabulary]: a letter of the byte alphabet is one."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        is_bytes = index not in added and alphabet.issuperset(token)
        sizes[index] = len(token) if is_bytes else len(token.encode())
    return sizes
