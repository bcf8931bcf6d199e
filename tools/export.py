"""Write a checkpoint's model as a folder that other programs read and serve:
`python pretrain.py --out_dir=out/X --export=DIR`, or sft.py with the same.

    config.json, model*.safetensors     the released layout, of which support/weights.py tells
    generation_config.json              the ids that begin and end a text (also in config.json)
    tokenizer.json                      the tokenizer of training, whatever it was, and
    tokenizer_config.json               what transformers wants to know about it
    chat_template.jinja                 the chat format of sft.py, as a program for others

Matrices are bf16, and vectors and scalars stay fp32. So the numbers are just those that training on
GPUs computes with, and eval.py: both cast the matrices alone. Vectors in bf16 would change the
logits of a freshly grown model by 1e-3, those of a trained one by 6e-3 (relative; lambda vectors
and per-head norms alone make half of it). They are less than a thousandth of the bytes.
"""
import json
import os
import shutil
from pathlib import Path

import torch

import sft
from configurator import UserError
from model import Motif, MotifConfig
from support.run_folder import checkpoint_at, fsync_path, latest_checkpoint
from support.tokenizer import (BEGIN, BYTE_OF, END, TURN_END, JsonTokenizer, TiktokenTokenizer,
                               Tokenizer, load_tokenizer, tokenizer_file)
from support.weights import (INDEX, check_finite, iter_checkpoint, read_json, safetensors_errors,
                             tensor_files, write_json)


def export_checkpoint(c, out: Path) -> None:
    """Export the checkpoint that c.resume names, or else the newest of the run in `out`."""
    if c.resume in ("auto", "no"):
        start = latest_checkpoint(out)
    else:
        start = checkpoint_at(Path(c.resume))
    if not start:
        raise UserError(f"{out} holds no checkpoint to export; give --resume=PATH")
    with safetensors_errors():
        export(*start, Path(c.export))


def export(folder: Path, state: dict, to: Path) -> None:
    """Write the model of the checkpoint `folder`, whose state.json is `state`, into `to`, which
    appears under that name only when it is complete."""
    if os.path.lexists(to):
        raise UserError(f"{to} is there already; delete it or give another --export")
    config = check_whole(folder)
    tokenizer = load_tokenizer(state["config"]["tokenizer"])

    temporary = to.with_name(f"{to.name}.tmp")
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        raise UserError(f"{temporary} is there already: another export writes it, or was killed; "
                        "then delete it") from None
    try:
        export_tokenizer(tokenizer, temporary)
        total = export_model(folder, tokenizer, temporary)
        for path in [*temporary.iterdir(), temporary]:
            fsync_path(path)
        os.replace(temporary, to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"{folder} is in {to}: {total / 1e9:.2f} GB, matrices in bf16 and vectors in fp32")
    for limit in server_limits(config):
        print(f"note: {limit}")


def check_whole(folder: Path) -> MotifConfig:
    """The shape of the model. UserError unless the folder has all its tensors."""
    config = MotifConfig.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Motif(config)
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    for _ in iter_checkpoint(folder, "model", shapes):
        break                                        # all is checked before the first tensor
    return config


# What attention takes in the family's own branch of vLLM; server_limits has the rest.
SERVED_HEAD_DIMS = (32, 64, 96, 128, 160, 192, 224, 256)
SERVED_EPS = 1e-6


def server_limits(config: MotifConfig) -> list[str]:
    """A line for each property of the shape that the family's server does not take. Our own
    programs take them all."""
    c = config
    found = []
    if c.num_attention_heads % 2:
        found.append(f"num_attention_heads={c.num_attention_heads}; it must be even")
    if c.head_dim not in SERVED_HEAD_DIMS:
        sizes = ", ".join(str(size) for size in SERVED_HEAD_DIMS)
        found.append(f"head_dim={c.head_dim}; it must be one of {sizes}")
    if c.num_noise_heads == 0:
        found.append("num_noise_heads=0; there must be some")
    if c.activation != "poly_norm":
        found.append(f"activation={c.activation}; it must be poly_norm")
    elif c.rms_norm_eps != SERVED_EPS:
        found.append(f"rms_norm_eps={c.rms_norm_eps:g}; its PolyNorm has {SERVED_EPS:g}")
    return [f"the family's server, a branch of vLLM, does not take {limit}" for limit in found]


def export_model(folder: Path, tokenizer: Tokenizer, to: Path) -> int:
    """Write the weights, file by file, config.json and the index -> bytes of the weights."""
    from safetensors.torch import load_file, save_file
    total = 0
    for file in tensor_files(folder, "model"):
        tensors = {}
        for name, t in load_file(file).items():
            check_finite(folder, name, t)
            tensors[name] = t.bfloat16() if t.ndim > 1 else t.float()
        save_file(tensors, to / file.name, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors", flush=True)

    config = read_json(folder / "config.json")
    write_json(to / "config.json", config | {"torch_dtype": "bfloat16"} | end_ids(tokenizer))
    index = folder / f"model{INDEX}"
    if index.exists():
        write_json(to / index.name, read_json(index) | {"metadata": {"total_size": total}})
    return total


# ---- the tokenizer
#
# A tokenizer.json describes steps, each of which the library `tokenizers` has under a name:
#
#     added tokens     cut out of the text, where they are spelled
#     normalizer       changes the text between them, as to lower case
#     pre-tokenizer    cuts it into pieces, as words
#     model            pieces -> ids, as by merges of byte-level BPE
#     post-processor   puts tokens before and after the ids
#
# If training had a tokenizer.json, we change what as_trained_with says. For tiktoken's tokenizers
# and for "byte" we write one: it gives the same ids, and the tests compare them.


def end_ids(tokenizer: Tokenizer) -> dict:
    """The ids that begin a text and end it, as transformers names them in its files. Generation
    stops at both of the latter: END closes a document, and TURN_END a reply."""
    special = tokenizer.special
    return {"bos_token_id": special[BEGIN], "eos_token_id": [special[END], special[TURN_END]]}


def export_tokenizer(tokenizer: Tokenizer, to: Path) -> None:
    """Write the tokenizer's files. Of the folder that a tokenizer.json came from we take that file
    alone: the template there, and the tokens that begin and end a text, are another model's."""
    if isinstance(tokenizer, JsonTokenizer):
        spec = read_json(tokenizer_file(tokenizer.name))
    else:
        spec = as_json(tokenizer)
    write_json(to / "tokenizer.json", as_trained_with(spec, tokenizer.special))
    write_json(to / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
        "clean_up_tokenization_spaces": False})      # would take spaces out of decoded text
    write_json(to / "generation_config.json", end_ids(tokenizer))
    template = chat_template(tokenizer)
    (to / "chat_template.jinja").write_text(template, encoding="utf-8")
    if not renders_as_trained(tokenizer, to):
        print("note: this tokenizer treats the beginning of a text in a way of its own, so that "
              "conversations served by chat_template.jinja have slightly other ids than sft.py's",
              flush=True)


def as_json(tokenizer: TiktokenTokenizer) -> dict:
    """The content of a tokenizer.json that gives the ids of one of tiktoken's tokenizers.

    tiktoken merges any two neighbours that together are a token, the token of lowest id first. In
    a tokenizer.json each merge is a pair, and the first in the list is done first: so we list, in
    the order of ids, all pairs that make each token."""
    letter_of = {byte: letter for letter, byte in BYTE_OF.items()}

    def spell(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    ids = tokenizer.library._mergeable_ranks
    merges = []
    for token in sorted(ids, key=ids.get):
        for i in range(1, len(token)):
            first, second = token[:i], token[i:]
            if first in ids and second in ids:
                merges.append(f"{spell(first)} {spell(second)}")

    # An added token takes the id that its spelling has here; any other would get the next free one.
    vocab = {spell(token): i for token, i in ids.items()} | tokenizer.special

    # The tokens of "byte" are single bytes, so that it does not matter where text is cut.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    steps = [byte_level]
    if merges:
        steps.insert(0, split_at({"Regex": for_oniguruma(tokenizer.library._pat_str)}, "Isolated"))
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        # ignore_merges: a piece that is a token needs no merges.
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": bool(merges)},
    }


def for_oniguruma(pattern: str) -> str:
    r"""A pattern of tiktoken's in the syntax of the library that `tokenizers` has. There {1,3}+ is
    a repetition of {1,3}. For tiktoken it is possessive, which changes no match at the end of an
    alternative.

    >>> for_oniguruma(r"\p{N}{1,3}+|\s")
    '\\p{N}{1,3}|\\s'
    """
    return pattern.replace("}+|", "}|")


def split_at(pattern: dict, behavior: str) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def as_trained_with(spec: dict, special: dict[str, int]) -> dict:
    """A tokenizer.json's content as training used it: with our special tokens, BEGIN before every
    text, no text cut or padded, and the steps that chat_template relies on."""
    added = [token for token in spec.get("added_tokens") or [] if token["content"] not in special]
    for token, i in special.items():
        added.append({"id": i, "content": token, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True})
    added.sort(key=lambda token: token["id"])

    normalizers = [{"type": "Replace", "pattern": {"String": BREAK}, "content": ""}]
    pre_tokenizers = [split_at({"String": CUT}, "Removed")]
    if spec.get("normalizer"):
        normalizers.append(spec["normalizer"])
    if spec.get("pre_tokenizer"):
        pre_tokenizers.append(spec["pre_tokenizer"])

    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    ids = {"id": BEGIN, "ids": [special[BEGIN]], "tokens": [BEGIN]}
    return spec | {
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": {"type": "TemplateProcessing", "single": [begin, first],
                           "pair": [begin, first, second], "special_tokens": {BEGIN: ids}},
    }


# ---- the chat template
#
# Others write a conversation as text, by the template, and then encode the whole. The ids must be
# those of sft.encode_chat, which encodes part by part. Two things come in between:
#
# - "\n\n" and what follows might be encoded together: the pre-tokenizer of GPT-2 cuts "\n\nHi" into
#   "\n", "\n", "Hi", where sft.py has one token "\n\n". So the template writes CUT after "\n\n".
# - A user may spell a special token, "<|endofturn|>", and so end a turn. So the template writes
#   BREAK after the first letter: "<", BREAK, "|endofturn|>".
#
# The tokenizer.json removes both, CUT in a step that cuts there, and BREAK once the added tokens
# have been found. They are noncharacters: Unicode reserves them for such use within programs.

BREAK = "\ufdd0"
CUT = "\ufdd1"

CHAT_TEMPLATE = r"""
{{- '<|beginoftext|>' }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('a message has the role ' ~ message['role']) }}
    {%- endif %}
    {%- set body = namespace(text=message['content']) %}
    {%- for token in SPECIAL_TOKENS %}
        {%- set body.text = body.text | replace(token, token[0] ~ '\ufdd0' ~ token[1:]) %}
    {%- endfor %}
    {{- '<|startofturn|><|' ~ message['role'] ~ '|>\n\n\ufdd1' ~ body.text ~ '<|endofturn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|startofturn|><|assistant|>\n\n' }}
{%- endif %}
""".strip()


def chat_template(tokenizer: Tokenizer) -> str:
    """CHAT_TEMPLATE for this tokenizer, in which no text can spell one of its special tokens."""
    special = json.dumps(list(tokenizer.special), ensure_ascii=False)
    return CHAT_TEMPLATE.replace("SPECIAL_TOKENS", special) + "\n"


def renders_as_trained(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the template and the tokenizer.json give a conversation the ids of sft.py. With some
    tokenizers, which treat the beginning of a text in a way of their own, the ids differ."""
    from jinja2 import Template
    from tokenizers import Tokenizer as Library
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"  What is {TURN_END}?\n"},
                {"role": "assistant", "content": "The end of a turn."},
                {"role": "user", "content": "\nThanks"}]
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    text = Template(template).render(messages=messages, add_generation_prompt=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    ids = library.encode(text, add_special_tokens=False).ids
    return ids == sft.encode_prompt(tokenizer, messages)
