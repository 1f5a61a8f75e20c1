"""From text to tokens: a tokenizer of transformers, how many bytes each token stands for, and a quick way to encode.

Whatever the tokenizer, it has an end-of-text token, which stands behind each document.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ssmscan.shapes import check_integer, error

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """What there is to know of a tokenizer.

    ``token_bytes`` (v,), int64, is the length of each token as UTF-8 (bytes): 0 for those that are no text. ``encode``
    turns several texts into an array of tokens for each, in which a text that reads like a special token is only text.
    """

    tokenizer: PreTrainedTokenizerFast
    token_bytes: np.ndarray
    encode: Callable[[list[str]], list[np.ndarray]]

    @property
    def size(self) -> int:
        return len(self.token_bytes)

    @property
    def end(self) -> int:
        """The token behind each document."""
        return self.tokenizer.eos_token_id


def of_bytes() -> Vocabulary:
    """Token i is the byte i of UTF-8, and 256 the end of text.

    Example:
        >>> from ssmscan.tasks.text.vocabulary import of_bytes
        >>> vocabulary = of_bytes()
        >>> vocabulary.encode(["aé"])[0].tolist(), vocabulary.end, vocabulary.tokenizer.decode([97, 195, 169])
        ([97, 195, 169], 256, 'aé')
    """
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({symbol: byte for byte, symbol in enumerate(_byte_symbols())}, []))
    _make_byte_level(tokenizer, use_regex=False)
    return Vocabulary(
        _wrapped(tokenizer),
        np.append(np.ones(256, dtype=np.int64), 0),
        lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts],
    )


def of_characters(texts: Iterable[str]) -> Vocabulary:
    """Token i is the i-th of the characters that occur in ``texts``, by code point, and the last is the end of text.

    Example:
        >>> from ssmscan.tasks.text.vocabulary import of_characters
        >>> vocabulary = of_characters(["to be", "é"])
        >>> vocabulary.encode(["bé"])[0].tolist(), vocabulary.end, vocabulary.token_bytes.tolist()
        ([1, 5], 6, [1, 1, 1, 1, 1, 2, 0])
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    occurring: set[str] = set()
    for text in texts:
        occurring.update(text)
    characters = sorted(occurring)
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, ""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    points = np.array([ord(character) for character in characters])
    token_of = np.zeros(points[-1] + 1, dtype=np.uint32)
    token_of[points] = np.arange(len(points))
    return Vocabulary(
        _wrapped(tokenizer),
        np.array([len(character.encode()) for character in characters] + [0]),
        lambda texts: [token_of[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] for text in texts],
    )


def learnt(texts: Iterable[str], size: int) -> Vocabulary:
    """The ``size`` tokens of a byte-level BPE that is learnt from ``texts``; fewer where these do not hold so many.

    Token 0 is the end of text, and 1 to 256 are the bytes, so that no text is unknown.

    Raises:
        ValueError: a size under 257, which does not hold the bytes.

    Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016), section 3.2; on
    bytes, Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2.

    Example:
        >>> from ssmscan.tasks.text.vocabulary import learnt
        >>> vocabulary = learnt(["no no no"], 259)
        >>> tokens = vocabulary.encode(["no no"])[0].tolist()
        >>> tokens, vocabulary.token_bytes[tokens].tolist()
        ([257, 258], [2, 3])
    """
    from tokenizers import Tokenizer, models, trainers

    check_integer("text", "vocab", size, 257)
    tokenizer = Tokenizer(models.BPE())
    _make_byte_level(tokenizer, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=_byte_symbols(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _of_tokenizer(_wrapped(tokenizer))


def named(source: str) -> Vocabulary:
    """The tokenizer of a JSON file of the library tokenizers, or of a folder or name that transformers knows.

    Raises:
        ValueError: none is there, it has no end-of-text token, or it is written in Python alone.
    """
    return _of_tokenizer(_loaded(source))


def identity(source: str) -> str:
    """What tells the tokenizer ``source`` from others: its name, or the SHA-256 of what :func:`named` loads."""
    if source in ("bytes", "characters"):
        return source
    tokenizer = _loaded(source)
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.eos_token_id}".encode()).hexdigest()


def _loaded(source: str) -> PreTrainedTokenizerFast:
    tokenizer = _of_file(source) if source.endswith(".json") else _of_transformers(source)
    if tokenizer.eos_token_id is None:
        advice = "Name its eos_token in tokenizer_config.json, and give the folder."
        raise ValueError(error("text", "tokenizer must have an end-of-text token", f"{source} without", advice))
    return tokenizer


def _of_file(source: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(source)
    except Exception as reason:  # The class that tokenizers raises.
        rule = "tokenizer must be a file that tokenizers reads"
        raise ValueError(error("text", rule, f"{source}: {reason}")) from None
    return _wrapped(tokenizer, END if tokenizer.token_to_id(END) is not None else None)


def _of_transformers(source: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as reason:
        rule = "tokenizer must be bytes, characters, a .json file, or a folder or name that transformers knows"
        raise ValueError(error("text", rule, f"{source}: {str(reason).splitlines()[0].rstrip('.')}")) from None
    if not tokenizer.is_fast:
        raise ValueError(error("text", "tokenizer must be one of the library tokenizers", f"{source}, in Python"))
    return tokenizer


def _wrapped(tokenizer: Tokenizer, end: str | None = END) -> PreTrainedTokenizerFast:
    """``tokenizer`` as transformers has it; an end-of-text token that it has not becomes its last token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, clean_up_tokenization_spaces=False)


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer: itself where it shows, else one past 255."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _make_byte_level(tokenizer: Tokenizer, use_regex: bool) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    from tokenizers import Tokenizer

    # A copy, for these settings are not the tokenizer's own.
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()

    def encode(texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as reason:  # The class that tokenizers raises where a vocabulary has no word for the unknown.
            raise ValueError(error("text", "tokenizer must know all of data", f"{reason}")) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return Vocabulary(tokenizer, _token_bytes(tokenizer), encode)


def _token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The length of each token as UTF-8 (bytes); 0 for special ones."""
    names = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    lengths = np.zeros(max(names.values()) + 1, dtype=np.int64)
    byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    for name, token in names.items():
        if token in added:
            lengths[token] = 0 if added[token].special else len(name.encode())
        elif byte_level:
            # Of which each character stands for a byte.
            lengths[token] = len(name)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            lengths[token] = 1
        else:
            # What it adds behind another token: at the beginning of a text some decoders take a space off.
            once, twice = (len(tokenizer.decode([token] * times).encode()) for times in (1, 2))
            lengths[token] = twice - once
    return lengths
