"""Tokenizers: their ids are those of `tokenizers` and of tiktoken, special tokens stay text, and a
tokenizer that cannot be read is one line."""
import base64
import json
from pathlib import Path

import huggingface_hub
import pytest
import tiktoken
import tokenizers
from tokenizers import (AddedToken, Regex, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

import sft
from configurator import UserError
from eval import PromptEncoder
from support.tokenizer import (BEGIN, BYTE_OF, END, GPT2_PATTERN, SPECIALS, TiktokenTokenizer,
                               bytes_per_token, encode_document, load_tokenizer, tiktoken_ids)

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SCRIPTS = """\
The miller's lamp burns low; he'll read by it, they've said, until the oil is gone. I'M SURE.
    def weigh(flour, sacks=3):\t# grams\r\n\t    return {k: v ** 2 for k, v in flour.items()}\r\n
$\\sum_{i=1}^{n} i^2 = \\frac{n(n+1)(2n+1)}{6}$, ∀ε>0 ∃δ: |x−a| < δ ⇒ ‖f(x)‖₂ ≤ ε; 𝟙𝟚 ½ Ⅻ x²
1 12 123 1234 12345678901234567890 0xff00 1,000,000.50 +82-10-1234 2025-11-25 v1.2.3 99%   7
Die Mühle größer als das Schloß, „süß“ – naïve façade, œuvre, ¿mañana?, žluté, gęś, İğdır, ſtraße
На мельнице горит свет. Хліб її їсть ґава. Το φως καίει στον μύλο. האור דולק בטחנה.
ضوء المصباح في الطاحونة ١٢٣. चक्की में दीया जलता है १२३। மில்லில் விளக்கு எரிகிறது।
แสงไฟในโรงสี ๑๒๓ გემო ლამპა աղաց լույս ព្រះច័ន្ទ ወፍጮ Đèn cối xay gió, ﬁsh
磨坊裡的燈還亮著，今年是二〇二五年。水車小屋の灯りがともる、カタカナ。 
방앗간에 불이 켜져 있다. 밀가루 세 자루!
😀 👩‍👩‍👧 🇰🇷 👍🏽 ❤️ ✍🏿 ☃\u200b\ufeff\u00a0\u3000\u2003|\x00\x0b\x0c\x85\u2028  \n \n
\n\t\t   x  !!!!! ---- =====
don’t e\u0301 \ud7b0 \U0010ffff 'S'sS 'T\u017f ' re\r\r
 aaaaaaaaa  
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def byte_level(pattern: str | None = None, special: tuple = (END,)) -> tokenizers.Tokenizer:
    """Byte-level BPE trained on SCRIPTS; text is cut by GPT-2's pattern or by another."""
    library = tokenizers.Tokenizer(models.BPE())
    library.decoder = decoders.ByteLevel()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        library.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([SCRIPTS], trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), show_progress=False,
        initial_alphabet=alphabet))
    return library


def sentencepiece() -> tokenizers.Tokenizer:
    """BPE over letters as Llama 2's file has it: spaces become U+2581, rare letters bytes."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                               normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    spelled_bytes = [f"<0x{i:02X}>" for i in range(256)]
    library.train_from_iterator([SCRIPTS[:900]], trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *spelled_bytes],
        show_progress=False))
    spec = json.loads(library.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # a spelled byte is no special token
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def lower_case() -> tokenizers.Tokenizer:
    """A normalizer that changes the text, and an added token that is not special."""
    library = byte_level(special=SPECIALS[:4])
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.add_tokens(["<think>"])
    return library


LIBRARIES = {"gpt2": byte_level, "llama3": lambda: byte_level(LLAMA3_PATTERN, SPECIALS[:4]),
             "sentencepiece": sentencepiece, "lower case": lower_case}


def write_tiktoken(path: str, library: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The .tiktoken file of a byte-level BPE -> {token: id}."""
    ids = {}
    for token, i in library.get_vocab(with_added_tokens=False).items():
        if token != END:
            ids[bytes(BYTE_OF[letter] for letter in token)] = i
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for token, i in ids.items()]
    Path(path).write_text("".join(lines))
    return ids


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(kind):
    library = LIBRARIES[kind]()
    Path("folder").mkdir()
    library.save("folder/tokenizer.json")
    tokenizer = load_tokenizer("folder")
    text = SCRIPTS + "<think>" * (kind == "lower case")
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ids and max(ids) < library.get_vocab_size()
    if kind == "lower case":
        assert ids[-1] == library.token_to_id("<think>")
        assert tokenizer.decode(ids) == library.normalizer.normalize_str(text)
    else:
        assert tokenizer.decode(ids) == text
    spelled = b"".join(tokenizer.token_bytes(i) for i in ids).decode("utf-8")
    assert spelled.removeprefix(" " * (kind == "sentencepiece")) == tokenizer.decode(ids)
    assert bytes_per_token(tokenizer)[ids].sum() == len(spelled.encode("utf-8"))


def test_a_tokenizer_of_many_steps_gives_the_ids_of_the_tokenizers_library():
    """A normalizer, Digits and two Splits, and added tokens of every kind that are not special."""
    library = byte_level(special=SPECIALS[:4])
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r"\p{Han}+"), "isolated"),
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.add_tokens([
        AddedToken("<think>", normalized=False), AddedToken("<b>", lstrip=True, rstrip=True),
        AddedToken("cat", single_word=True), AddedToken("ÉTÉ")])
    library.add_special_tokens([AddedToken("<role>", lstrip=True)])
    library.save("tokenizer.json")
    tokenizer = load_tokenizer("tokenizer.json")

    text = SCRIPTS + "<think>x concat cat E\u0301TE\u0301 12345"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.encode("a <b> c") == library.encode("a <b> c").ids
    for added in ("<think>", "<b>", "cat", "ÉTÉ"):
        assert tokenizer.encode(added) == [library.token_to_id(added)]

    # Conversations and evaluation give the same ids.
    expected = library.encode(text).ids
    ids, targets = sft.encode_chat(tokenizer, [{"role": "user", "content": text},
                                               {"role": "assistant", "content": text}])
    stop = tokenizer.special["<|endofturn|>"]
    assert ids[-len(expected) - 1:] == [*expected, stop]
    assert [target for target in targets if target >= 0] == [*expected, stop]
    assert PromptEncoder(tokenizer, None).encode_pair("", text)[1] == expected

    forged = tokenizer.encode(f"a <role> {END}")
    assert not set(forged) & set(tokenizer.special.values())
    assert tokenizer.decode(forged) == f"a <role> {END}"


def test_a_vocabulary_that_holds_special_tokens_does_not_find_them_in_text():
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator([SCRIPTS], trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>", *SPECIALS], unk_token="<unk>",
        initial_alphabet=list("</|_>"), show_progress=False))
    library.save("tokenizer.json")
    tokenizer = load_tokenizer("tokenizer.json")
    library.encode_special_tokens = True
    text = "the lamp </s> " + " ".join(SPECIALS)
    assert library.token_to_id("</s>") in library.encode(text).ids
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a lamp") == library.encode("a lamp").ids


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, LLAMA3_PATTERN], ids=["gpt2", "llama3"])
@pytest.mark.parametrize("blank", [" ", "\n", "\n ", "\t  "])
def test_a_million_blanks_are_no_panic(pattern, blank):
    write_tiktoken("t.tiktoken", byte_level())
    tokenizer = TiktokenTokenizer("t", pattern, tiktoken_ids(Path("t.tiktoken")), {})
    before = tokenizer.encode("The lamp burns.")
    after = tokenizer.encode("he'll read")
    for times in (900_000, 1_200_000):
        text = "The lamp burns." + blank * (times // len(blank)) + " \the'll read"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids[-len(after):] == after
        if "\n" not in blank or pattern == GPT2_PATTERN:  # Llama 3's pattern joins ".\n"
            assert ids[:len(before)] == before
        try:
            assert ids == tokenizer.library.encode_ordinary(text)
        except BaseException as e:
            assert times > 10**6 and "StackOverflow" in str(e)


def test_tiktoken_and_the_tokenizers_library_agree():
    library = byte_level()
    library.save("tokenizer.json")
    ids = write_tiktoken("t.tiktoken", library)
    reference = tiktoken.Encoding("reference", pat_str=GPT2_PATTERN, mergeable_ranks=ids,
                                  special_tokens={END: 0})
    by_tiktoken = load_tokenizer("t.tiktoken")
    by_tokenizers = load_tokenizer("tokenizer.json")
    expected = reference.encode_ordinary(SCRIPTS)
    assert by_tiktoken.encode(SCRIPTS) == by_tokenizers.encode(SCRIPTS) == expected
    for i in expected:
        assert by_tiktoken.token_bytes(i) == by_tokenizers.token_bytes(i) != b""


def test_byte_is_the_bytes_of_the_text():
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(SCRIPTS)
    assert ids == list(SCRIPTS.encode("utf-8"))
    assert tokenizer.n_vocab == 256 + len(SPECIALS)
    assert tokenizer.begin_id == tokenizer.special[BEGIN] == 256
    assert bytes_per_token(tokenizer).tolist() == [1] * 256 + [0] * len(SPECIALS)


def every_kind() -> list:
    """Each kind of tokenizer, loaded."""
    loaded = [load_tokenizer("byte")]
    write_tiktoken("t.tiktoken", byte_level())
    loaded.append(load_tokenizer("t.tiktoken"))
    for kind, make in LIBRARIES.items():
        make().save(f"{kind}.json")
        loaded.append(load_tokenizer(f"{kind}.json"))
    return loaded


def test_special_tokens_have_ids_of_their_own_and_their_spelling_is_text():
    for tokenizer in every_kind():
        special = tokenizer.special
        assert set(SPECIALS) <= set(special)
        assert len(set(special.values())) == len(special)
        assert max(special.values()) < tokenizer.n_vocab
        text = "say " + " ".join(special)
        ids = tokenizer.encode(text)
        assert not set(ids) & set(special.values()) and tokenizer.decode(ids) == text
        begin, *body, end = encode_document(tokenizer, text)
        assert (begin, body, end) == (special[BEGIN], ids, special[END])
        assert tokenizer.decode([begin, *ids, end]) == BEGIN + text + END
        assert not any(tokenizer.token_bytes(i) for i in special.values())
        assert bytes_per_token(tokenizer)[list(special.values())].sum() == 0


def test_special_tokens_that_a_tokenizer_lacks_come_after_its_own():
    for kind in ("gpt2", "llama3", "sentencepiece"):
        library = LIBRARIES[kind]()
        library.save("tokenizer.json")
        tokenizer = load_tokenizer("tokenizer.json")
        lacking = [token for token in SPECIALS if library.token_to_id(token) is None]
        n = library.get_vocab_size()
        assert [tokenizer.special[token] for token in lacking] == list(range(n, n + len(lacking)))
        for token in set(SPECIALS) - set(lacking):
            assert tokenizer.special[token] == library.token_to_id(token)
        assert tokenizer.n_vocab == n + len(lacking)


def test_a_turn_token_that_the_file_has_as_plain_text_is_special():
    library = byte_level()
    library.add_tokens(["<|user|>", "<|endofturn|>"])
    library.save("tokenizer.json")
    tokenizer = load_tokenizer("tokenizer.json")
    assert tokenizer.special["<|endofturn|>"] == library.token_to_id("<|endofturn|>")
    assert not set(tokenizer.encode("a<|endofturn|><|user|>")) & set(tokenizer.special.values())


def test_the_file_says_whether_a_text_begins_with_a_token():
    library = byte_level(special=SPECIALS)
    begin, end = library.token_to_id(BEGIN), library.token_to_id(END)
    for template, expected in (("$A", None), (f"{BEGIN} $A", begin), (f"$A {END}", None),
                               (f"{BEGIN} $A {END}", begin)):
        library.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(BEGIN, begin), (END, end)])
        library.save("tokenizer.json")
        tokenizer = load_tokenizer("tokenizer.json")
        assert tokenizer.begin_id == expected
        assert not {begin, end} & set(tokenizer.encode(SCRIPTS))


def test_no_text_is_cut_or_filled_up():
    library = byte_level()
    expected = library.encode(SCRIPTS).ids
    library.enable_truncation(8)
    library.enable_padding(length=10_000)
    library.save("tokenizer.json")
    assert load_tokenizer("tokenizer.json").encode(SCRIPTS) == expected


def test_what_is_not_text_gives_the_replacement_character():
    for tokenizer in every_kind():
        lone = tokenizer.decode(tokenizer.encode("a\ud800b"))
        assert lone == "a\ufffdb"
        beyond = tokenizer.n_vocab
        end = tokenizer.special[END]
        assert tokenizer.decode([beyond, end, 10**6]) == f"\ufffd{END}\ufffd"
        assert tokenizer.token_bytes(beyond).decode("utf-8", "replace") == "\ufffd"
    byte = load_tokenizer("byte")
    assert byte.decode([0xC3]) + byte.decode([0xC3, 0xA9]) == "\ufffdé"


def test_fingerprints_tell_tokenizers_apart():
    prints = [tokenizer.fingerprint() for tokenizer in every_kind()]
    assert len(set(prints)) == len(prints)
    assert [tokenizer.fingerprint() for tokenizer in every_kind()] == prints
    assert {len(fingerprint) for fingerprint in prints} == {32}


def test_a_hub_name_is_its_tokenizer_json_downloaded_once(monkeypatch):
    byte_level().save("downloaded.json")
    kept = {}
    asked = []

    def download(name, file):
        asked.append((name, file))
        if name == "no/one":
            raise OSError("404\nnot found")
        kept[name] = "downloaded.json"
        return kept[name]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, _: kept.get(name))
    expected = byte_level().encode(SCRIPTS).ids
    for _ in range(2):
        assert load_tokenizer("Some-Org/Model.2").encode(SCRIPTS) == expected
    assert asked == [("Some-Org/Model.2", "tokenizer.json")]
    refused("no/one", "404 not found")


def refused(name, *words):
    with pytest.raises(UserError) as error:
        load_tokenizer(name).encode("text")
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in (name, *words)), said


@pytest.mark.parametrize("name, content", [
    ("none.json", None), ("none.tiktoken", None), (".", None), ("gpt-2", None), ("x.json", b"{"),
    ("x.json", b"\xff"), ("x.json", b"{}"), ("x.tiktoken", b""), ("x.tiktoken", b"YQ=="),
    ("x.tiktoken", b"".join(base64.b64encode(bytes([i])) + b" 7\n" for i in range(256)))])
def test_a_tokenizer_that_cannot_be_read_is_named_in_one_line(name, content):
    if content is not None:
        Path(name).write_bytes(content)
    refused(name)


def test_a_panic_of_the_library_is_one_line():
    spec = json.loads(byte_level().to_str())
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    Path("panics.json").write_text(json.dumps(spec))
    refused("panics.json", "PanicException")


def test_a_text_that_the_library_cannot_encode_is_one_line():
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    spec = {"version": "1.0", "added_tokens": [], "model": model}
    Path("words.json").write_text(json.dumps(spec))
    refused("words.json", "[UNK]")
