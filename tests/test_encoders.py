"""The fast encoder against the reference: ids, and where tokens begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_klong.data import tokenize as tokenizing
from megatron_klong.trajectory.encoder import FastEncoder, SlowEncoder, text_encoder
from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.importing import import_trajectories
from megatron_klong.trajectory.tokenizer import phrase_tokenizer, save_tokenizer, train_bpe_tokenizer

CORPUS = [
    "the quick brown fox 12 jumps over 345 ünïcödé letters 🎉🎉",
    "def f(x):\n    return x + 1\n\n",
    "日本語",
] * 9
WORDS = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained() -> Tokenizer:
    return train_bpe_tokenizer(CORPUS, FORMATS["glm-4.5"], 500)


def like_qwen() -> Tokenizer:
    """NFC, a regex, then bytes; and added tokens that are not special."""
    tokenizer = trained()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("häuser", normalized=False)])
    return tokenizer


TOKENIZERS = {
    "trained": trained(),
    "like Qwen's": like_qwen(),
    "phrases": phrase_tokenizer(["read item 4", "größer als"], FORMATS["qwen3"]),
}
FAST = {name: FastEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}

fragments = st.sampled_from(
    ["the quick", " ", "\n\n", "12345", "ü", "u\u0308", "🎉", "日本", "\x00", "<|user|>", "<think>", "häuser",
     "\u017f", "\r\n", "'s"]
)  # fmt: skip
texts = st.lists(st.one_of(fragments, st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_both_encoders_agree(name: str, text: str) -> None:
    fast, slow = FAST[name], SlowEncoder(TOKENIZERS[name])
    assert fast.encode(text).tolist() == slow.encode(text).tolist()
    ids, starts = fast.encode_with_starts(text)
    expected_ids, expected = slow.encode_with_starts(text)
    assert ids.tolist() == expected_ids.tolist()
    assert letters_at(text, starts) == letters_at(text, expected)


def letters_at(text: str, starts: np.ndarray) -> list[int]:
    """The letter in which each byte lies."""
    ends = np.cumsum([len(letter.encode()) for letter in text])
    return np.searchsorted(ends, starts, side="right").tolist()


def test_starts_are_bytes_of_the_text() -> None:
    text = "the quick ü日🎉 fox"
    ids, starts = FastEncoder(TOKENIZERS["trained"]).encode_with_starts(text)
    pieces = [text.encode()[a:b] for a, b in zip(starts, [*starts[1:], len(text.encode())])]
    alphabet = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256)))
    spelled = [TOKENIZERS["trained"].id_to_token(int(token)) for token in ids]
    assert [len(piece) for piece in pieces] == [len(token) for token in spelled]
    assert all(set(token) <= set(alphabet) for token in spelled)
    assert pieces[0].decode() == spelled[0]


def test_other_tokenizers_are_encoded_by_the_reference() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert isinstance(text_encoder(words), SlowEncoder)
    assert text_encoder(words).encode("a b c").tolist() == [0, 1, 2]
    words.decoder = decoders.ByteLevel()
    assert isinstance(text_encoder(words), SlowEncoder)
    assert isinstance(text_encoder(TOKENIZERS["trained"]), FastEncoder)


def test_other_ids_end_the_tokenizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that is wrong is found before its ids are in a store."""
    monkeypatch.setattr(FastEncoder, "encode", lambda self, text: self._slow.encode(text)[::-1].copy())
    save_tokenizer(trained(), tmp_path / "bpe")
    source = tmp_path / "chat.jsonl"
    source.write_text(
        '{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "12"}]}\n'
    )
    import_trajectories([source], tmp_path / "imported.jsonl")
    with pytest.raises(ValueError, match=r"fastokens .* gives other ids than tokenizers in trajectory"):
        tokenizing.tokenize(
            tmp_path / "imported.jsonl", tmp_path / "store", renderer="glm-4.5", tokenizer=tmp_path / "bpe"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "chat.jsonl", "imported.jsonl"]
