"""Write a checkpoint's model in bf16, in the released layout: pretrain.py --export=DIR."""
import os
import shutil
from pathlib import Path

import torch

import data
from configurator import UserError
from model import (INDEX, Motif, MotifConfig, model_folder, read_json, iter_checkpoint, tensor_files,
                   write_json)
from pretrain import fsync_path


def export(folder: Path, state: dict, to: Path) -> None:
    """Write a checkpoint's model, cast to bf16, in the released layout, file by file, and what
    serves it. ValueError if `to` is there already, the checkpoint is damaged or its tokenizer is
    gone, OSError if it cannot write."""
    from safetensors.torch import load_file, save_file
    if to.exists():
        raise UserError(f"{to} is there already; delete it or give another --export")
    config, total = read_json(folder / "config.json"), 0
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Motif(MotifConfig.from_dict(config)).state_dict().items()}
    next(iter_checkpoint(folder, "model", shapes))        # refuses a folder that is not whole
    temporary = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    export_tokenizer(state["config"]["tokenizer"], temporary)
    for file in tensor_files(folder, "model"):
        tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
        save_file(tensors, temporary / file.name, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors", flush=True)
    write_json(temporary / "config.json", config | {"torch_dtype": "bfloat16"})
    if (folder / f"model{INDEX}").exists():
        write_json(temporary / f"model{INDEX}", read_json(folder / f"model{INDEX}") | {
            "metadata": {"total_size": total}})
    for path in [*temporary.iterdir(), temporary]:
        fsync_path(path)
    os.replace(temporary, to)
    print(f"{folder} is in {to}: {total / 1e9:.2f} GB in bf16")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")


def export_tokenizer(name: str, to: Path) -> None:
    """Write generation_config.json, which has the ids that begin and end a text, and where the
    tokenizer is a tokenizer.json also that and the others of TOKENIZER_FILES beside it. The copy
    has those special tokens too that load_tokenizer adds, and puts BEGIN before a text, as training
    did. ValueError if the tokenizer cannot be had."""
    special = data.load_tokenizer(name).special
    write_json(to / "generation_config.json", {
        "bos_token_id": special[data.BEGIN],
        "eos_token_id": [special[data.END], special[data.TURN_END]]})
    is_file = name.endswith(".json")
    place = Path(name).parent if is_file else model_folder(name, TOKENIZER_FILES)
    file = Path(name) if is_file else place / "tokenizer.json"
    if not file.exists():                               # byte or tiktoken's
        return
    spec = read_json(file)
    known = {t["content"] for t in spec["added_tokens"]}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] += [{"id": i, "content": token, **plain, "special": True}
                             for token, i in special.items() if token not in known]
    begin, a, b = ({kind: {"id": name, "type_id": 0}} for kind, name in (
        ("SpecialToken", data.BEGIN), ("Sequence", "A"), ("Sequence", "B")))
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, a], "pair": [begin, a, b],
        "special_tokens": {data.BEGIN: {"id": data.BEGIN, "ids": [special[data.BEGIN]],
                                        "tokens": [data.BEGIN]}}}
    write_json(to / "tokenizer.json", spec)
    write_json(to / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                              "bos_token": data.BEGIN, "eos_token": data.END})
    for other in TOKENIZER_FILES[1:]:
        if (place / other).exists():
            shutil.copy(place / other, to)
