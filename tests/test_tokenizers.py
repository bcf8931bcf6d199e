"""Tokenizers: by their definition, id for id as the `tokenizers` library has them, and what a bad
one is told. `python tests/test_tokenizers.py` makes the fixture, with that library (0.23.3)."""
import base64
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import regex

import data
from data import load_tokenizer, prepare
from test_data import BYTE, room, tiktoken_file  # noqa: F401  room: every test has an empty folder

FIXTURE = Path(__file__).parent / "tokenizers.json"
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
<think>a spelling is text</think> don’t e\u0301 \ud7b0 \U0010ffff 'S'sS 'T\u017f ' re\r\r
 aaaaaaaaa  
"""


def forms() -> dict[str, tuple[dict, list[int]]]:
    """Form -> a tokenizer.json and the ids that the library gives for SCRIPTS."""
    fixture = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return {form: (in_form(form, fixture["files"]), ids) for form, ids in fixture["ids"].items()}


def in_form(form: str, files: dict[str, dict]) -> dict:
    """A form of one of two tokenizers: as trained, or with another pre-tokenizer or merges."""
    spec = json.loads(json.dumps(files["gpt2" if form == "gpt2" else "llama3"]))
    if form == "gpt2":
        return spec
    split, model = spec["pre_tokenizer"]["pretokenizers"][0], spec["model"]
    if "gaps" in form:                                   # a pattern that does not take all text
        split["pattern"]["Regex"] = r"\p{L}{1,9}|\p{N}{1,3}"
    if "removed" in form:
        split.update(behavior="Removed", invert=True)
    if form == "every merge":                            # as files made from tiktoken's state them
        words = [t for t in model["vocab"] if t not in data.SPECIALS]
        model["merges"] = [f"{t[:k]} {t[k:]}" for t in words for k in range(1, len(t))
                           if {t[:k], t[k:]} <= model["vocab"].keys()]
    return spec


FORMS = "gpt2", "llama3", "llama3 removed", "every merge", "gaps", "gaps removed"


MERGES = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"a", b"n"), (b"an", b"d"), (b" ", b"and"),
          (b"1", b"2"), (b"\xc3", b"\xa9"), (b"e", b"n"), (b"\n", b"\n")]
IDS = {t: i for i, t in enumerate([*(bytes([255 - b]) for b in range(256)),
                                   *(a + b for a, b in MERGES)])}
TEXT = "the then and  the\n\n\nand12 3123 caf\u00e9 <|endoftext|> \U0001f600\x00 the's ' the"
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}|\s+|[^\s\p{N}]+"}, "invert": False,
         "behavior": "Isolated"}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps, {**LEVEL, "use_regex": False}]}


def tokenizer_json(pre_tokenizer=LEVEL, normalizer=None, end=266, added=(), **model):
    others = iter(range(256, 512))  # GPT-2's letters for bytes, as its encoder.py has them
    letters = [chr(b if 33 <= b < 127 or 161 <= b < 173 or 174 <= b else next(others))
               for b in range(256)]
    shown = {token: "".join(letters[b] for b in token) for token in IDS}
    model = {"type": "BPE", "vocab": {shown[token]: i for token, i in IDS.items()},
             "merges": [f"{shown[a]} {shown[b]}" for a, b in MERGES], **model}
    Path("tokenizer.json").write_text(json.dumps({
        "model": model, "pre_tokenizer": pre_tokenizer, "normalizer": normalizer,
        "added_tokens": [{"id": end, "content": data.END, **dict(added)}]}))
    return load_tokenizer("tokenizer.json")


def naive_bpe(pattern, text):
    """Ids by the definition: within every piece, always the earliest merge first."""
    for piece in regex.findall(pattern, text):
        parts = [bytes([b]) for b in piece.encode()]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in MERGES]:
            i = [*zip(parts, parts[1:])].index(min(pairs, key=MERGES.index))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield from (IDS[part] for part in parts)


def test_tokenizers_follow_the_definition_and_keep_every_text():
    tiktoken_file("gpt2.tiktoken", IDS)
    for tokenizer, expected in (
            (BYTE, TEXT.encode()), (load_tokenizer("gpt2.tiktoken"), data.GPT2_PATTERN),
            (tokenizer_json(), data.GPT2_PATTERN), (tokenizer_json(end=300), data.GPT2_PATTERN),
            (tokenizer_json(sequence(SPLIT)), SPLIT["pattern"]["Regex"])):
        begin, *ids, end = data.encode_document(tokenizer, TEXT)
        assert ids == [*(naive_bpe(expected, TEXT) if isinstance(expected, str) else expected)]
        specials, n = tokenizer._special_tokens, tokenizer.n_vocab
        assert {*data.SPECIALS} <= {*specials} and (begin, end) == (specials[data.BEGIN],
                                                                   specials[data.END])
        assert len({*ids, *specials.values()}) == len({*ids}) + len(specials)
        assert len(data.token_bytes(tokenizer)) == n
        assert data.token_bytes(tokenizer)[[*ids, *specials.values()]].sum() == len(TEXT.encode())
        assert data.decode(tokenizer, ids) == TEXT
        assert data.decode(tokenizer, [n, end, 10**6, *ids[-1:]])[:15] == f"\ufffd{data.END}\ufffd"
        lone = data.encode_document(tokenizer, "a\ud800b")[1:-1]
        assert data.decode(tokenizer, lone) == "a\ufffdb"
    assert data.decode(tokenizer_json(end=300), [290, 300]) == f"\ufffd{data.END}"
    prints = [data.fingerprint(t) for t in (BYTE, tokenizer_json(), tokenizer_json(end=300),
                                            tokenizer_json(sequence(SPLIT)), tokenizer_json())]
    assert len({*prints}) == 4 and prints[1] == prints[4]


@pytest.mark.parametrize("name, content, message", [
    ("none.json", None, "FileNotFoundError: No such file"),
    (".", None, "the folder has no tokenizer.json"),
    ("gpt-2", None, "it is neither 'byte', a .tiktoken"), ("x.json", b"{", "JSONDecodeError: "),
    ("x.json", b"[]", "TypeError: "), ("x.json", b"{}", "KeyError: 'model'"),
    ("x.tiktoken", b"", "some of the 256 bytes have no token"),
    ("x.tiktoken", b"YQ==", "not enough values to unpack"), ("x.tiktoken", b"Y 1", "Error: "),
    ("x.tiktoken", b"".join(base64.b64encode(bytes([i])) + b" 7\n" for i in range(256)),
     "two of its tokens have the same id")])
def test_a_bad_tokenizer_is_one_line(name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^tokenizer {name}: [^\n]*{re.escape(message)}[^\n]*$"):
        prepare({"a": ("x.txt", 1, 1)}, name, "d", {"a": 1})
    assert not Path("d").exists()


@pytest.mark.parametrize("changes, message", [
    *(({"pre_tokenizer": pre}, word) for pre, word in (
        ({"type": "Metaspace"}, "not by Metaspace"), (None, "not by None"),
        (sequence(), "'use_regex': False"), (sequence(SPLIT, SPLIT), "by Split, then Split, then"),
        (sequence({"type": "Digits"}), "by Digits, then ByteLevel"),
        ({**LEVEL, "add_prefix_space": True}, "add_prefix_space': True"),
        ({**LEVEL, "use_regex": False}, "use_regex': False"),
        (sequence({**SPLIT, "behavior": "Removed"}), "Removed and inverted.*'invert': False"),
        (sequence({**SPLIT, "invert": True}), "'invert': True"),
        (sequence({**SPLIT, "pattern": {"String": " "}}), "by a Regex, not .*'String': ' '"),
        *((sequence({**SPLIT, "pattern": {"Regex": odd}}), f"its Split has {re.escape(part)} in ")
          for odd, part in ((r"\s+$|\S", "$"), (r"(?m:.)", "(?m"), (r"a{1,3}+", "{1,3}+"),
                            (r"[^[:alpha:]]", "[:alpha:]"))),
        (sequence({**SPLIT, "pattern": {"Regex": "("}}), "Parsing error"))),
    ({"normalizer": {"type": "NFC"}}, "its normalizer NFC"), ({"type": "Unigram"}, "not Unigram"),
    ({"end_of_word_suffix": "</w>"}, "</w>"), ({"vocab": {"a": 0}}, "KeyError: 'th'"),
    ({"vocab": {"\u4e2d": 0}}, "its token '\u4e2d' is not written in the letters"),
    ({"added": {"content": "\t", "special": False}}, r"its added token '\\t' is plain text"),
    ({"merges": []}, "its merges are not its tokens in the order of their ids")])
def test_a_tokenizer_json_of_another_kind_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^tokenizer tokenizer.json: .*{message}"):
        tokenizer_json(**changes)


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_tokenizers_library(form):
    spec, expected = forms()[form]
    Path("folder").mkdir()
    Path("folder/tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer("folder")
    assert tokenizer.encode_ordinary(SCRIPTS) == expected
    assert (data.decode(tokenizer, expected) == SCRIPTS) == (form != "gaps removed")
    specials = tokenizer._special_tokens
    assert {t["content"]: t["id"] for t in spec["added_tokens"]}.items() <= specials.items()
    new = [specials[token] for token in data.SPECIALS if token not in spec["model"]["vocab"]]
    first = max(t["id"] for t in [*spec["added_tokens"], {"id": len(spec["model"]["vocab"]) - 1}])
    assert new == [*range(first + 1, first + 1 + len(new))] and len(new) == (6 if form == "gpt2"
                                                                            else 3)


def test_a_hub_name_is_its_tokenizer_json_downloaded_once(monkeypatch):
    kept, asked = {}, []

    def download(name, file):
        asked.append((name, file))
        if name == "no/one":
            raise OSError("404\nnot found")
        Path("kept.json").write_text(json.dumps(forms()["gpt2"][0]))
        return kept.setdefault(name, "kept.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, _: kept.get(name))
    for _ in range(2):
        assert load_tokenizer("Some-Org/Model.2").encode_ordinary(SCRIPTS) == forms()["gpt2"][1]
    assert asked == [("Some-Org/Model.2", "tokenizer.json")]
    with pytest.raises(ValueError, match="^tokenizer no/one: there is no such folder, and the Hub "
                                         "did not .*: OSError: 404 not found$"):
        load_tokenizer("no/one")


def make_fixture() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    files, ids = {}, {}
    for name, special in ("gpt2", [data.END]), ("llama3", data.SPECIALS[:4]):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
        tokenizer.pre_tokenizer = level if name == "gpt2" else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), level])
        tokenizer.train_from_iterator([SCRIPTS], trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*special], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        files[name] = json.loads(tokenizer.to_str())
    for form in FORMS:
        tokenizer = Tokenizer.from_str(json.dumps(in_form(form, files)))
        ids[form] = tokenizer.encode(SCRIPTS, add_special_tokens=False).ids
    parts = [f'"{key}": {{\n' + ",\n".join(
        f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in group.items()) + "}"
        for key, group in (("files", files), ("ids", ids))]
    FIXTURE.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    make_fixture()
