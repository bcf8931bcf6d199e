"""The files of a model or a checkpoint: tensors in safetensors files, settings in JSON."""
import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from configurator import UserError, one_line, short

# ---- files
#
# A released model is a folder, and so is a training checkpoint, with the optimizer's tensors under
# another stem:
#
#     config.json                           the shape, see released_config.py
#     model.safetensors                     all tensors by name, if they fit into one file; else
#     model-00001-of-00011.safetensors ...  several files (11 of at most 5 GB for 12.7B in fp32)
#     model.safetensors.index.json          {"weight_map": {tensor name: file name}, ...}

INDEX = ".safetensors.index.json"
STORED_DTYPES = ("F64", "F32", "F16", "BF16")        # of weights, in the names of safetensors
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"              # of a tied model the head, too


def save_tensors(path: Path, stem: str, tensors: dict[str, Tensor], file_bytes: int,
                 json_files: dict[str, dict] | None = None) -> None:
    """Write name -> tensor to path/<stem>.safetensors, or to several files and an index. A file has
    at most file_bytes, unless a single tensor is larger. json_files: file name -> what to write
    beside them, such as config.json. All is first written to *.tmp files. Only when these are
    complete is an earlier model in this folder touched, so that a full disk cannot destroy it.

    If FSDP2 shards some of the tensors, all ranks call this. They assemble each tensor together,
    and each rank writes some of the files."""
    from safetensors.torch import save_file
    rank, world = 0, 1
    is_sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
    if is_sharded:
        # Not imported at the top: support.ranks reads this process's rank when it is imported, and
        # a process may import the model before it has a rank (tests fork theirs).
        from support.ranks import sync_errors
        rank, world = dist.get_rank(), dist.get_world_size()

    names_of_file = divide_into_files(tensors, stem, file_bytes)
    json_files = dict(json_files or {})
    if len(names_of_file) > 1:
        json_files[stem + INDEX] = make_index(tensors, names_of_file)

    # All tensors are assembled before any file is written: if writing fails on one rank, the other
    # ranks must not be left waiting for it in full_tensor().
    mine = assemble_files(tensors, names_of_file, rank, world)

    def write_temporaries() -> None:
        path.mkdir(parents=True, exist_ok=True)
        with safetensors_errors():
            for file, contents in mine.items():
                save_file(contents, path / f"{file}.tmp", metadata={"format": "pt"})
        if rank == 0:
            for file, content in json_files.items():
                (path / f"{file}.tmp").write_text(json_text(content), encoding="utf-8")

    def remove_earlier_model() -> None:
        if rank == 0:
            remove_earlier(path, stem, names_of_file, json_files)

    def rename_temporaries() -> None:
        for file in mine:
            os.replace(path / f"{file}.tmp", path / file)

    def rename_json_files() -> None:
        if rank == 0:
            for file in json_files:
                os.replace(path / f"{file}.tmp", path / file)

    # No rank begins a stage before all have ended the one before; an error on one rank ends all. The
    # index goes before tensors are renamed, and the new one comes last. So if renaming stops half
    # way, there may be files of two models, but no index to read them by. (One file needs none.)
    stages = (write_temporaries, remove_earlier_model, rename_temporaries, rename_json_files)
    try:
        for stage in stages:
            sync_errors(stage) if is_sharded else stage()
    except BaseException:
        for file in (*mine, *json_files):
            (path / f"{file}.tmp").unlink(missing_ok=True)
        raise


def save_one_by_one(path: Path, stem: str, like: dict[str, Tensor],
                    tensors: Iterator[tuple[str, Tensor]], file_bytes: int,
                    json_files: dict[str, dict]) -> None:
    """Write what save_tensors would, of (name, tensor) that come one after the other: no more than
    the tensors of one file are in memory. like: all names in the same order, with tensors of the
    same shapes and dtypes, such as those on the meta device. An earlier model in the folder is
    overwritten from the beginning. A failure while tensors are written leaves none."""
    from safetensors.torch import save_file
    path.mkdir(parents=True, exist_ok=True)
    names_of_file = divide_into_files(like, stem, file_bytes)
    json_files = dict(json_files)
    if len(names_of_file) > 1:
        json_files[stem + INDEX] = make_index(like, names_of_file)
    remove_earlier(path, stem, names_of_file, json_files)
    try:
        with safetensors_errors():
            for file, names in names_of_file.items():
                contents = {}
                for name in names:
                    made, tensor = next(tensors)
                    assert made == name and tensor.shape == like[name].shape, (made, name)
                    assert tensor.dtype == like[name].dtype, name
                    contents[name] = tensor.contiguous()
                save_file(contents, path / file, metadata={"format": "pt"})
    except BaseException:
        for file in names_of_file:
            (path / file).unlink(missing_ok=True)
        raise

    # Last, so that nobody takes a half for a whole.
    for file, content in json_files.items():
        write_json(path / file, content)


def make_index(tensors: dict[str, Tensor], names_of_file: dict[str, list[str]]) -> dict:
    """The content of <stem>.safetensors.index.json."""
    weight_map = {name: file for file, names in names_of_file.items() for name in names}
    total_size = sum(t.numel() * t.element_size() for t in tensors.values())
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def assemble_files(tensors: dict[str, Tensor], names_of_file: dict[str, list[str]], rank: int,
                   world: int) -> dict[str, dict[str, Tensor]]:
    """{file: {name: whole tensor}} of the files that this rank writes, every world-th one. All
    ranks assemble each tensor together; of several ranks, the one that writes its file keeps a copy
    on the host."""
    mine = {}
    for i, (file, names) in enumerate(names_of_file.items()):
        is_mine = i % world == rank
        if is_mine:
            mine[file] = {}
        for name in names:
            whole = assemble(tensors[name])
            if is_mine:
                mine[file][name] = whole.cpu() if world > 1 else whole
    return mine


def assemble(t: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may shard."""
    if hasattr(t, "full_tensor"):
        t = t.full_tensor()
    return t.contiguous()


def remove_earlier(path: Path, stem: str, files, json_files) -> None:
    """Remove what would not be overwritten of an earlier model: programs read all files of a folder
    that have such names. Its JSON files go too, so that nobody takes a half for a whole."""
    name_of_ours = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for old in path.iterdir():
        name = old.name.removesuffix(".tmp")
        if name_of_ours.fullmatch(name) and name not in files and name not in json_files:
            old.unlink()
    for file in json_files:
        (path / file).unlink(missing_ok=True)


@contextmanager
def safetensors_errors():
    """safetensors has an exception of its own for a full disk and the like: make it an OSError."""
    from safetensors import SafetensorError
    try:
        yield
    except SafetensorError as e:
        raise OSError(str(e)) from None


def checksum(file: Path) -> int:
    """The file's CRC-32: it finds any single flipped bit. (Of 500 MB in memory in 0.16 s; SHA-256:
    0.37 s, on one core of an EPYC.)"""
    value = 0
    with open(file, "rb") as f:
        while block := f.read(2**22):
            value = zlib.crc32(block, value)
    return value


def divide_into_files(tensors: dict[str, Tensor], stem: str,
                      file_bytes: int) -> dict[str, list[str]]:
    """File name -> the names of its tensors, in order, of at most file_bytes together.

    >>> tensors = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}
    >>> divide_into_files(tensors, "model", file_bytes=12)
    {'model-00001-of-00002.safetensors': ['a'], 'model-00002-of-00002.safetensors': ['b', 'c']}
    """
    files = [[]]
    size = 0
    for name, t in tensors.items():
        nbytes = t.numel() * t.element_size()
        if files[-1] and size + nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    total = len(files)
    return {f"{stem}-{i:05d}-of-{total:05d}.safetensors": names
            for i, names in enumerate(files, 1)}


def iter_checkpoint(path: Path, stem: str, shapes: dict[str, tuple],
                    device: torch.device | None = None) -> Iterator[tuple[str, Callable]]:
    """Yield (name, read) of each tensor that save_tensors wrote: read() loads the tensor,
    read(*slices) a part of it. Call read before advancing.

    shapes: the tensors that there must be, all of them and no others, except those that follow from
    them (a tied head, the frequencies of rotary positions). UserError, before anything is
    yielded, if they are not there."""
    from safetensors import safe_open
    files = tensor_files(path, stem)
    check_stored_tensors(path, files, shapes)
    for file in files:                # one at a time: a mapped file takes memory
        with safe_open(file, "pt", device=str(device or "cpu")) as f:
            for name in f.keys():
                if name in shapes:
                    yield name, functools.partial(read_tensor, f, name)


def read_tensor(f, name: str, *slices: slice) -> Tensor:
    if slices:
        return f.get_slice(name)[slices]
    return f.get_tensor(name)


def check_stored_tensors(path: Path, files: dict[Path, set | None], shapes: dict) -> None:
    """UserError unless the files hold just these tensors, each in the file that the index says."""
    from safetensors import SafetensorError, safe_open
    stored = {}
    file_of = {}
    problems = []
    for file, indexed in files.items():
        try:
            with safe_open(file, "pt") as f:
                parts = {name: f.get_slice(name) for name in f.keys()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file}: cannot be read: {one_line(e)}") from None
        for name, part in parts.items():
            if name.endswith("rotary_emb.inv_freq"):      # in some releases; follows from theta
                continue
            stored[name] = tuple(part.get_shape())
            file_of[name] = file
            if part.get_dtype() not in STORED_DTYPES:
                problems.append(f"{name} is of {part.get_dtype()}, not {', '.join(STORED_DTYPES)}")
            if indexed is not None and name not in indexed:
                problems.append(f"{name} is in {file.name}, not where the index says")

    for name in stored.keys() - shapes.keys():
        wrapper = re.match(r"(.*\.)?(_orig_mod|module)\.", name)
        if wrapper:
            raise UserError(f"{path}: tensor names contain {wrapper[2] + '.'!r}, which a wrapper "
                            "(torch.compile, DistributedDataParallel) adds; remove it from them")

    # Some programs write the head of a tied model as well.
    if HEAD in stored and HEAD not in shapes and EMBEDDING in stored:
        del stored[HEAD]
        if not same_numbers(file_of, HEAD, EMBEDDING):
            problems.append(f"{HEAD} differs from {EMBEDDING}, but config.json has "
                            "tie_word_embeddings=true")

    for name, shape in shapes.items():
        if name not in stored:
            problems.append(f"missing {name}")
        elif stored[name] != tuple(shape):
            problems.append(f"{name} is {stored[name]}, not {tuple(shape)}")
    problems += [f"extra {name}" for name in stored if name not in shapes]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{path}: tensors do not fit: {'; '.join(problems[:4])}{more}")


def same_numbers(file_of: dict[str, Path], first: str, second: str) -> bool:
    """Whether these two stored tensors are equal."""
    from safetensors import safe_open
    with safe_open(file_of[first], "pt") as f, safe_open(file_of[second], "pt") as g:
        a = f.get_tensor(first)
        b = g.get_tensor(second)
    return torch.equal(a, b.to(a.dtype))


def check_finite(path: Path, name: str, t: Tensor) -> None:
    """UserError if a number of t is NaN or infinite. Its sum tells, unless finite numbers add up to
    an infinity."""
    if not torch.isfinite(t.sum()) and not torch.isfinite(t).all():
        raise UserError(f"{path}: {name} has numbers that are NaN or infinite")


def tensor_files(path: Path, stem: str) -> dict[Path, set | None]:
    """The safetensors files of this stem, each with the tensors that the index puts there; None
    where there is no index, but one file."""
    index = path / (stem + INDEX)
    names = {f"{stem}.safetensors": None}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: its weight_map must give each tensor's file")
        names = {}
        for tensor, file in weight_map.items():
            names.setdefault(str(file), set()).add(tensor)
    for name in names:
        if Path(name).name != name:                       # ../x, /x: not to be read for others
            raise UserError(f"{index}: {short(name)} is not a file of this folder")
        if not (path / name).is_file():
            hint = ""
            if not path.is_dir():
                hint = "; there is no such folder"
            elif any(path.glob("step_*")):
                hint = "; it is a run's folder: give one of its step_ folders"
            raise UserError(f"{path}: {short(name)} is missing{hint}")
    return {path / name: names[name] for name in sorted(names)}


def model_folder(name, patterns=("*.json", "*.safetensors")) -> Path:
    """The folder of this name, or the files of these patterns of a Hub repository "owner/name"."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return path
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:   # a dozen kinds: no network, no such name, a licence to accept first
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{name}: there is no such folder, and the Hub did not give it: "
                        f"{type(e).__name__}: {reason}") from None


def read_json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        hint = "; the folder of a model has one" if file.name == "config.json" else ""
        raise UserError(f"{file} cannot be read ({one_line(e)}){hint}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object")
    return found


def write_json(file: Path, value: dict) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json_text(value), encoding="utf-8")
    os.replace(temporary, file)


def json_text(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"
