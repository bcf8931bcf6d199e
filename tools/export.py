"""Write a checkpoint's model in bf16, in the released layout, with its tokenizer, so that other
programs can serve it: `python pretrain.py --out_dir=out/X --export=DIR`."""
import os
import shutil
from pathlib import Path

import torch

from configurator import UserError
from model import Motif, MotifConfig
from support.run_folder import fsync_path, latest_checkpoint, read_state, safetensors_errors
from support.tokenizer import BEGIN, END, TURN_END, load_tokenizer
from support.weights import (INDEX, iter_checkpoint, model_folder, read_json, tensor_files,
                             write_json)


def export_checkpoint(c, out: Path) -> None:
    """Export the checkpoint of the run in `out` that c.resume names, the newest by default."""
    if c.resume == "auto":
        start = latest_checkpoint(out)
    else:
        start = (Path(c.resume), read_state(Path(c.resume)))
    if not start:
        raise UserError(f"{out} holds no checkpoint to export; give --resume=PATH")
    with safetensors_errors():
        export(*start, Path(c.export))


def export(folder: Path, state: dict, to: Path) -> None:
    """Write the model of the checkpoint `folder`, whose state.json is `state`, into `to`, which
    appears under that name only when it is complete."""
    if to.exists():
        raise UserError(f"{to} is there already; delete it or give another --export")
    check_whole(folder)
    temporary = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        export_tokenizer(state["config"]["tokenizer"], temporary)
        total = export_model(folder, temporary)
        for path in [*temporary.iterdir(), temporary]:
            fsync_path(path)
        os.replace(temporary, to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"{folder} is in {to}: {total / 1e9:.2f} GB in bf16")


def check_whole(folder: Path) -> None:
    """UserError unless the folder has all tensors of the model in its config.json."""
    with torch.device("meta"):
        model = Motif(MotifConfig.from_dict(read_json(folder / "config.json")))
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    for _ in iter_checkpoint(folder, "model", shapes):
        break                                        # all is checked before the first tensor


def export_model(folder: Path, to: Path) -> int:
    """Write the weights, file by file, config.json and the index -> bytes of the weights."""
    from safetensors.torch import load_file, save_file
    total = 0
    for file in tensor_files(folder, "model"):
        tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
        save_file(tensors, to / file.name, metadata={"format": "pt"})
        total += sum(t.nbytes for t in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors", flush=True)

    config = read_json(folder / "config.json")
    write_json(to / "config.json", config | {"torch_dtype": "bfloat16"})
    index = folder / f"model{INDEX}"
    if index.exists():
        write_json(to / index.name, read_json(index) | {"metadata": {"total_size": total}})
    return total


# What a tokenizer's folder may hold, as transformers names it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja")


def export_tokenizer(name: str, to: Path) -> None:
    """Write generation_config.json, which has the ids that begin and end a text; and where the
    tokenizer is a tokenizer.json, also that file, with what load_tokenizer adds to it, and the
    TOKENIZER_FILES beside it."""
    special = load_tokenizer(name).special
    write_json(to / "generation_config.json", {
        "bos_token_id": special[BEGIN],
        "eos_token_id": [special[END], special[TURN_END]]})

    if name.endswith(".json"):
        file = Path(name)
    else:
        file = model_folder(name, TOKENIZER_FILES) / "tokenizer.json"
    if not file.exists():
        return                                       # the tokenizer is "byte", or one of tiktoken's

    write_json(to / "tokenizer.json", as_trained_with(read_json(file), special))
    write_json(to / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                              "bos_token": BEGIN, "eos_token": END})
    for other in TOKENIZER_FILES[1:]:
        if (file.parent / other).exists():
            shutil.copy(file.parent / other, to)


def as_trained_with(spec: dict, special: dict[str, int]) -> dict:
    """A tokenizer.json's content with the special tokens that load_tokenizer added, and with BEGIN
    put before every text, as training did."""
    known = {token["content"] for token in spec["added_tokens"]}
    added = []
    for token, i in special.items():
        if token not in known:
            added.append({"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True})

    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    ids = {"id": BEGIN, "ids": [special[BEGIN]], "tokens": [BEGIN]}
    template = {"type": "TemplateProcessing", "single": [begin, first],
                "pair": [begin, first, second], "special_tokens": {BEGIN: ids}}
    return spec | {"added_tokens": spec["added_tokens"] + added, "post_processor": template}
