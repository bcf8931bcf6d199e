"""Tokenizers: text <-> ids, with the special tokens of the turn format.

Byte-level BPE, which most tokenizers are, in one example. A pattern cuts "the lamp" into "the" and
" lamp". Within each piece every byte begins as a token, and the vocabulary is a list of merges:

    t h e   ->   th e   ->   the            by the merges "t"+"h", "th"+"e"

Libraries do this work: tiktoken for .tiktoken files and its own names, Hugging Face's `tokenizers`
for any tokenizer.json. What is here makes both of them look the same, and keeps special tokens and
text apart: text cannot spell a special token, and a library's panic becomes a line of text.
"""
import base64
import hashlib
import json
import os
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from configurator import UserError, one_line

# Special tokens of the Motif family's turn format, in which sft.py writes conversations. A
# tokenizer that lacks some of them gets them here, with ids after its own.
BEGIN = "<|beginoftext|>"
END = "<|endoftext|>"
TURN = "<|startofturn|>"
TURN_END = "<|endofturn|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BEGIN, END, TURN, TURN_END, *ROLES.values())


class Tokenizer:
    """Text <-> ids. load_tokenizer() makes one; a subclass for each library does the work.

        name        what load_tokenizer was given
        n_vocab     the largest id, plus 1
        special     {special token: id}; all of SPECIALS are in it
        begin_id    the id that comes before a text: what the rule of a tokenizer.json puts there,
                    None if it puts none; with the other tokenizers BEGIN's, as in training

    A subclass sets begin_id and identity, bytes that tell it from other tokenizers, and has
    _encode(text) and _decode(ids) for ordinary tokens.

    encode() takes the spelling of a special token for plain text, so that no document and no user
    can forge the end of a turn. Code that means the token itself writes its id.

    >>> byte = load_tokenizer("byte")
    >>> byte.encode("Hé<|endoftext|>")[:6]
    [72, 195, 169, 60, 124, 101]
    >>> byte.special["<|endoftext|>"], byte.n_vocab
    (257, 263)
    >>> byte.decode([72, 195, 169, 257])
    'Hé<|endoftext|>'
    """

    def __init__(self, name: str, special: dict[str, int], bytes_of: dict[int, bytes]):
        """special: the special tokens that the tokenizer itself has, {token: id}. bytes_of: {id:
        the bytes of text that it stands for} of all its other tokens."""
        self.name = name
        self.special = dict(special)
        self.bytes_of = bytes_of
        self.n_vocab = 1 + max([*bytes_of, *special.values()], default=-1)
        for token in SPECIALS:
            if token not in self.special:
                self.special[token] = self.n_vocab
                self.n_vocab += 1
        self.spelling = {i: token for token, i in self.special.items()}

    def __reduce__(self):
        """How another process gets it: by its name, once."""
        return load_once, (self.name,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token."""
        with library_errors(self.name):
            return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 give U+FFFD, and so does an id that no token
        has, which an untrained model may sample."""
        text = ""
        run = []  # ordinary tokens are decoded together: one letter may be several tokens
        for i in ids:
            if i in self.bytes_of:
                run.append(i)
            else:
                text += self._decode(run) + self.spelling.get(i, "\ufffd")
                run = []
        return text + self._decode(run)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of text that id i stands for: b"" for a special token. An id that no token has
        gives a byte that is not UTF-8, and so U+FFFD once it is decoded."""
        return b"" if i in self.spelling else self.bytes_of.get(i, b"\xff")

    def fingerprint(self) -> bytes:
        """32 bytes, which differ between tokenizers that could give different ids."""
        return hashlib.sha256(self.identity).digest()


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken: a pattern cuts the text into pieces, then pairs of tokens within
    a piece are merged, the pair whose merged token has the lowest id first."""

    def __init__(self, name: str, pattern: str, ids: dict[bytes, int], special: dict[str, int]):
        taken = set(special.values())
        bytes_of = {i: token for token, i in ids.items() if i not in taken}
        if len(bytes_of) < len(ids):
            raise UserError(f"tokenizer {name}: two of its tokens have the same id")
        if not all(bytes([i]) in ids for i in range(256)):
            raise UserError(f"tokenizer {name}: some of the 256 bytes have no token")

        super().__init__(name, special, bytes_of)
        self.begin_id = self.special[BEGIN]
        tokens = sorted(ids.items(), key=lambda item: item[1])
        self.identity = repr((pattern, tokens, sorted(self.special.items()))).encode()
        with library_errors(name):
            self.library = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ids,
                                             special_tokens=self.special)

    def _encode(self, text: str) -> list[int]:
        # First the library tries, so that every text that it can encode gets its ids. A text at
        # which it panics is cut. The ids of the words before and after a long blank stay the same
        # when it is cut.
        try:
            return self.library.encode_ordinary(text)
        except BaseException as e:  # a panic of Rust code is not an Exception
            parts = cut_long_blanks(text)
            if isinstance(e, KeyboardInterrupt) or len(parts) == 1:
                raise

        ids = []
        for part in parts:
            ids += self.library.encode_ordinary(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")


LONG_BLANK = 100_000  # characters; [ours], a tenth of what tiktoken can take


def cut_long_blanks(text: str) -> list[str]:
    """The text in parts: each run of white space is cut after every LONG_BLANK characters. tiktoken
    panics at a run of a million: to match "\\s+(?!\\S)", its engine for patterns remembers a place
    to go back to for each character, and its stack is full.

    >>> [len(part) for part in cut_long_blanks("two" + 250_000 * " " + "words")]
    [100003, 100000, 50005]
    """
    parts = []
    begin = 0
    for run in re.finditer(rf"\s{{{LONG_BLANK},}}", text):
        for end in range(run.start() + LONG_BLANK, run.end(), LONG_BLANK):
            parts.append(text[begin:end])
            begin = end
    parts.append(text[begin:])
    return parts


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by Hugging Face's `tokenizers`. Its normalizer, its splits, its model
    and its added tokens that are not special (Motif's <think>) do what they do in that library. We
    change three things: texts are neither cut nor padded, no token is put before or after them, and
    special tokens do not come from text."""

    def __init__(self, name: str, file: Path):
        from tokenizers import Tokenizer as Library
        with library_errors(file):
            self.identity = file.read_bytes()
            library = Library.from_str(self.identity.decode("utf-8"))

            # A file may say that every text is cut or padded to one length, as for inference.
            library.no_truncation()
            library.no_padding()

            # encode_special_tokens means: encode the spelling of special tokens like other text.
            ids = library.get_vocab(with_added_tokens=True)
            library.add_special_tokens([token for token in SPECIALS if token in ids])
            library.encode_special_tokens = True

            # Which token the file puts before a text is seen in how it encodes one.
            added = library.get_added_tokens_decoder()
            with_begin = library.encode("a", add_special_tokens=True)
            self.in_letters = special_in_letters(json.loads(self.identity)["model"], ids, added)

        special = {token.content: i for i, token in added.items() if token.special}
        byte_level = "ByteLevel(" in f"{library.pre_tokenizer} {library.decoder}"
        bytes_of = {}
        for token, i in ids.items():
            if i not in added:
                bytes_of[i] = spelled_bytes(token, byte_level)
            elif not added[i].special:
                bytes_of[i] = token.encode("utf-8")

        super().__init__(name, special, bytes_of)
        self.library = library
        begins = with_begin.special_tokens_mask[:1] == [1]
        self.begin_id = with_begin.ids[0] if begins else None

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = self.library.encode(text, add_special_tokens=False).ids
        if self.in_letters.keys().isdisjoint(found):
            return found

        ids = []
        for i in found:
            ids += self.in_letters.get(i, [i])
        return ids

    def _decode(self, ids: list[int]) -> str:
        with library_errors(self.name):
            return self.library.decode(ids, skip_special_tokens=False)


def special_in_letters(model: dict, ids: dict[str, int], added: dict) -> dict[int, list[int]]:
    """{special token: the tokens of its letters} for special tokens that are words of the model's
    vocabulary as well. A Unigram model, as T5 has, finds the word </s> in a text like any other,
    and the library then gives the id of the special token. We put < / s > in its place."""
    unknown = model.get("unk_id")
    if unknown is None:
        unknown = ids.get(model.get("unk_token"))

    in_letters = {}
    for i, token in added.items():
        if token.special and i != unknown:
            letters = [ids.get(letter, unknown) for letter in token.content]
            in_letters[i] = [letter for letter in letters if letter is not None]
    return in_letters


def byte_letters() -> dict[str, int]:
    """{letter: byte}: how byte-level BPE spells bytes in a tokenizer.json. GPT-2's rule: a visible
    byte of Latin-1 is its own letter, the others take the letters from U+0100 on.

    >>> bytes(byte_letters()[letter] for letter in "Ġcaf\u00c3\u00a9").decode("utf-8")
    ' café'
    """
    letters = {}
    unused = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            letters[chr(byte)] = byte
        else:
            letters[chr(unused)] = byte
            unused += 1
    return letters


BYTE_OF = byte_letters()


def spelled_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes of text that a word of a tokenizer.json's vocabulary stands for."""
    if byte_level and all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    if re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte of a letter that has no token
        return bytes([int(token[1:-1], 16)])
    return token.replace("\u2581", " ").encode("utf-8")  # SentencePiece's sign for a space


@contextmanager
def library_errors(name: str | Path):
    """Whatever a tokenizer library raises within becomes one UserError that names the tokenizer."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as e:  # a panic of Rust code is not an Exception
        raise UserError(f"tokenizer {name}: {one_line(e)}") from None


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, which is one of

        byte                  an id for each byte; needs no file and no network
        gpt2, o200k_base ...  a name that tiktoken knows; downloaded once
        some/file.tiktoken    a file of tiktoken's; text is cut by GPT-2's pattern
        some/tokenizer.json   a file of Hugging Face's, or a folder that has one
        owner/name            a repository of the Hugging Face Hub that has one; downloaded once
    """
    known = tiktoken.list_encoding_names()
    if name == "byte":
        ids = {bytes([i]): i for i in range(256)}
        return TiktokenTokenizer(name, r"(?s).{1,64}", ids, {})

    if name in known:
        with library_errors(f"{name} (--tokenizer=byte needs no network)"):
            library = tiktoken.get_encoding(name)
        return TiktokenTokenizer(name, library._pat_str, library._mergeable_ranks,
                                 library._special_tokens)

    if name.endswith(".tiktoken"):
        with library_errors(name):
            ids = tiktoken_ids(Path(name))
        return TiktokenTokenizer(name, GPT2_PATTERN, ids, {})

    if name.endswith(".json") or os.path.isdir(name) or HUB_NAME.fullmatch(name):
        return JsonTokenizer(name, tokenizer_file(name))

    raise UserError(f"tokenizer {name}: it must be 'byte', a .tiktoken file, a tokenizer.json, a "
                    f"folder with one, owner/name of the Hub, or one of {', '.join(known)}")


@cache
def load_once(name: str) -> Tokenizer:
    return load_tokenizer(name)


def tiktoken_ids(file: Path) -> dict[bytes, int]:
    """{token: id} of a .tiktoken file, whose lines are a token in base64 and its id."""
    ids = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        token, i = line.split()
        ids[base64.b64decode(token)] = int(i)
    return ids


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json of a file's, a folder's or a Hub repository's name."""
    if name.endswith(".json"):
        return Path(name)

    if os.path.isdir(name):
        file = Path(name) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"tokenizer {name}: the folder has no tokenizer.json")
        return file

    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    try:
        kept = try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(kept, str):  # what was downloaded once needs no network again
            return Path(kept)
        HfApi().model_info(name, timeout=5)  # tells that there is no network in seconds
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as e:  # of a dozen kinds: no network, no such name, a licence to accept first
        raise UserError(f"tokenizer {name}: there is no such folder, and the Hub did not give a "
                        f"tokenizer.json: {one_line(e)}") from None


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """(n_vocab,) int64: the bytes of text that each id stands for, for bits per byte. 0 for special
    tokens and for ids that no token has."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for i, token in tokenizer.bytes_of.items():
        lengths[i] = len(token)
    return lengths


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """BEGIN, the tokens of the text, END."""
    return [tokenizer.special[BEGIN], *tokenizer.encode(text), tokenizer.special[END]]
