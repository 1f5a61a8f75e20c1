"""Tokenizers: bytes, characters, a learnt BPE and those of others; how many bytes a token is; what is refused."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ssmscan.tasks.text.vocabulary import END, identity, learnt, named, of_bytes, of_characters

TEXT = f"Ünder  the\tgreenwood trée,\r\n𝔗heir names {END} </s> are three\n" * 3


def _metaspace():
    """As those of SentencePiece: a space is a letter, and what is unknown becomes its bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁gre", *"enhtramswodiU,<>/|"]
    tokenizer = Tokenizer(
        models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def metaspace(tmp_path):
    _metaspace().save_pretrained(tmp_path / "metaspace")
    return str(tmp_path / "metaspace")


VOCABULARIES = {
    "bytes": lambda _: of_bytes(),
    "characters": lambda _: of_characters([TEXT[:40], TEXT]),
    "learnt": lambda _: learnt([TEXT], 280),
    "transformers": named,
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_encodes_all_of_a_text(name, metaspace, tmp_path):
    """Into tokens of known lengths, none of them special, from which transformers makes the text again."""
    vocabulary = VOCABULARIES[name](metaspace)
    tokens, empty = vocabulary.encode([TEXT, ""])
    assert tokens.max() < vocabulary.size
    assert len(empty) == 0
    assert vocabulary.token_bytes[vocabulary.end] == 0
    assert (vocabulary.token_bytes[tokens] > 0).all()
    assert vocabulary.token_bytes[tokens].sum() == len(TEXT.encode())
    vocabulary.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.decode(tokens.tolist()) == TEXT
    assert saved.eos_token_id == vocabulary.end
    assert len(saved) == vocabulary.size
    assert saved.encode(TEXT[:25]) == vocabulary.encode([TEXT[:25]])[0].tolist()


def test_bytes_and_characters_are_in_order():
    assert of_bytes().encode([TEXT])[0].tolist() == list(TEXT.encode())
    characters = sorted(set(TEXT))
    assert of_characters([TEXT]).encode([TEXT])[0].tolist() == [characters.index(character) for character in TEXT]


def test_learns_what_is_frequent():
    vocabulary = learnt(["ab ab ab ab abc abc"], 260)
    assert vocabulary.size == 260
    assert vocabulary.tokenizer.convert_ids_to_tokens([0, 257, 258, 259]) == [END, "ab", "Ġab", "Ġabc"]
    again = learnt(["ab ab ab", " ab abc abc"], 260)
    assert again.tokenizer.backend_tokenizer.to_str() == vocabulary.tokenizer.backend_tokenizer.to_str()
    every_byte = "".join(map(chr, range(256))) + "𝔗"
    (tokens,) = vocabulary.encode([every_byte])
    assert vocabulary.tokenizer.decode(tokens.tolist()) == every_byte


def test_a_small_text_holds_fewer_tokens_than_asked_for():
    assert 257 < learnt(["to be or not to be"], 16384).size < 300


def test_word_pieces(tmp_path):
    """Each stands for its letters and, where it begins a word, for the space before it."""
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[SEP]": 1, "green": 2, "##wood": 3, "tree": 4}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]").save_pretrained(tmp_path)
    vocabulary = named(str(tmp_path))
    (tokens,) = vocabulary.encode(["tree greenwood"])
    assert tokens.tolist() == [4, 2, 3]
    assert vocabulary.token_bytes.tolist() == [0, 0, 6, 4, 5]


def test_a_file_of_tokenizers(tmp_path):
    learnt([TEXT], 270).tokenizer.backend_tokenizer.save(str(tmp_path / "a.json"))
    vocabulary = named(str(tmp_path / "a.json"))
    assert vocabulary.end == 0
    assert np.array_equal(vocabulary.encode([TEXT])[0], learnt([TEXT], 270).encode([TEXT])[0])


def test_added_tokens_and_settings_of_a_tokenizer(tmp_path):
    """What a tokenizer would cut off or add is not; an added word has its length, a special one none."""
    tokenizer = learnt([TEXT], 270).tokenizer
    tokenizer.add_tokens(["grün"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(tmp_path)
    vocabulary = named(str(tmp_path))
    assert vocabulary.size == 272
    assert vocabulary.token_bytes[-2:].tolist() == [5, 0]
    tokens, short = vocabulary.encode([f"{TEXT} grün <pad>", "a"])
    assert vocabulary.token_bytes[tokens].sum() == len(f"{TEXT} grün <pad>".encode())
    assert 270 in tokens
    assert 271 not in tokens
    assert len(short) == 1


def test_identities(metaspace, tmp_path):
    learnt([TEXT], 270).tokenizer.backend_tokenizer.save(str(tmp_path / "a.json"))
    learnt([TEXT], 271).tokenizer.backend_tokenizer.save(str(tmp_path / "b.json"))
    sources = ["bytes", "characters", metaspace, str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert len({identity(source) for source in sources}) == 5
    assert identity(metaspace) == identity(metaspace)


def _save(name, folder):
    if name == "without.json":
        Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(folder / name))
    elif name == "broken.json":
        (folder / name).write_text("{")
    elif name == "without":
        tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)
    elif name == "slow":
        ByT5Tokenizer().save_pretrained(folder / name)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "without.json",
            r"tokenizer must have an end-of-text token, got .*without\.json without\. Name its",
        ),
        ("without", r"tokenizer must have an end-of-text token, got .*without without\. Name its eos_token in"),
        ("absent.json", r"tokenizer must be a file that tokenizers reads, got .*absent\.json: No such file"),
        ("broken.json", r"tokenizer must be a file that tokenizers reads, got .*broken\.json: EOF while parsing"),
        (
            "./absent",
            r"tokenizer must be bytes, characters, a \.json file, or a folder or name that transformers knows",
        ),
        ("slow", r"tokenizer must be one of the library tokenizers, got .*slow, in Python\."),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, name, part):
    _save(name, tmp_path)
    with pytest.raises(ValueError, match=f"^text: {part}") as refusal:
        named(str(tmp_path / name))
    assert "\n" not in str(refusal.value)


def test_what_a_tokenizer_does_not_know(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, END: 1}, "b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(tmp_path / "a.json"))
    vocabulary = named(str(tmp_path / "a.json"))
    assert vocabulary.encode(["aa"])[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="text: tokenizer must know all of data, got WordLevel error: Missing"):
        vocabulary.encode(["ab"])


@pytest.mark.parametrize(("size", "kind"), [(256, ValueError), (300.0, TypeError), (True, TypeError)])
def test_sizes_that_are_refused(size, kind):
    with pytest.raises(kind, match="text: vocab must be a"):
        learnt(["a"], size)
