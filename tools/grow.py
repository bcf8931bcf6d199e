"""Growth: a larger model that computes the same as a smaller one (arXiv 2511.07464), and the mean of
checkpoints: first weights for pretrain.py --init."""
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError
from kernels import upcast
from model import LAMBDAS, Attention, Motif, MotifConfig
from pretrain import SHARD_BYTES, model_config, checkpoint_steps, theta_at


def grow(model: Motif, config: MotifConfig, noise_db: float = 10.0, seed: int = 0) -> Motif:
    """A model of config's shape with the logits of the smaller `model`: width by HyperCloning
    (arXiv 2409.12903), depth by LLaMA-Pro (arXiv 2401.02415), as grown_tensors says. Same device
    and dtypes, lambda vectors and per-head norms aside, which are fp32; no memory is shared, and
    beside both models there is only some of a matrix. noise_db: how far the noise that parts the
    copies lies below the weights, math.inf for none, drawn on the device from `seed`. rope_theta
    stays the model's, as it changes the function; max_position_embeddings is config's. ValueError,
    one line, for a dimension that cannot be reached."""
    config = replace(config, rope_theta=model.config.rope_theta)
    return build_grown(model, config, check_growth(model.config, config), noise_db, seed)


def grow_width(model: Motif, factor: int, signal_ratio: int, noise_db: float = 10.0,
               seed: int = 0) -> Motif:
    """See grow: stream and MLP `factor` times as wide, signal_ratio signal heads for each noise
    head (without noise heads: query heads for each key head). Of a tied model the head becomes its
    own."""
    c = model.config
    return grow(model, replace(
        c, hidden_size=factor * c.hidden_size, intermediate_size=factor * c.intermediate_size,
        num_attention_heads=signal_ratio * groups(c) + c.num_noise_heads,
        tie_word_embeddings=c.tie_word_embeddings and factor == 1), noise_db, seed)


def grow_depth(model: Motif, every: int) -> Motif:
    """See grow: after every `every` layers a copy of the last of them that adds nothing yet.
    ValueError for less than one."""
    if every < 1:
        raise UserError(f"a layer is copied after every 1 or more, not every {every}")
    layers = model.config.num_hidden_layers
    return build_grown(model, replace(model.config, num_hidden_layers=layers + layers // every), every)


def groups(c: MotifConfig) -> int:
    """Of query heads: as many as there are noise heads, without those as there are key heads."""
    return c.num_noise_heads or c.num_key_value_heads


def check_growth(old: MotifConfig, new: MotifConfig) -> int:
    """After how many layers one is copied when a model of shape `old` grows to `new`. ValueError,
    one line, if it cannot."""
    new.check()
    signal, new_signal = (c.num_attention_heads - c.num_noise_heads for c in (old, new))
    factor, layers = new.hidden_size // old.hidden_size, old.num_hidden_layers
    copies = new.num_hidden_layers - layers
    every = layers // copies if 0 < copies <= layers else layers + 1
    fixed = {"vocab_size": "new words would take a share of every probability",
             "num_noise_heads": "every noise head is kept once",
             "num_key_value_heads": "keys and values stay", "head_dim": "heads stay as wide",
             **dict.fromkeys(("activation", "rms_norm_eps", "attn_rms_norm_eps"),
                             "it is another function")}
    wrong = {key: why for key, why in fixed.items() if getattr(old, key) != getattr(new, key)}
    if new.hidden_size != factor * old.hidden_size:
        wrong["hidden_size"] = "it must be a multiple"
    if new.intermediate_size != factor * old.intermediate_size:
        wrong["intermediate_size"] = f"it must grow as hidden_size does, {factor} times"
    if new_signal % signal:
        wrong["num_attention_heads"] = (f"{new_signal} signal heads are no multiple of {signal}")
    if layers // every != copies:
        counts = sorted({layers + layers // n for n in range(1, layers + 1)})
        wrong["num_hidden_layers"] = (f"copies after every 1, 2, ... layers make "
                                      f"{', '.join(map(str, counts))}")
    if new.tie_word_embeddings and not (old.tie_word_embeddings and factor == 1):
        wrong["tie_word_embeddings"] = "the head of a wider or an untied model is not its embedding"
    if wrong:
        raise UserError("; ".join(f"{key}={getattr(old, key)} cannot grow to {getattr(new, key)}: "
                                   f"{why}" for key, why in wrong.items()))
    return every


def build_grown(model: Motif, config: MotifConfig, every: int, noise_db: float = 10.0,
          seed: int = 0) -> Motif:
    """See grow; config can be reached, with a layer copied after every `every`."""
    with torch.device("meta"):
        larger = Motif(config)
    larger.load_state_dict(dict(grown_tensors(model, larger, every, noise_db, seed)), assign=True)
    device = model.model.layers[0].self_attn.layer.device
    for block in larger.model.layers:
        block.self_attn.layer = block.self_attn.layer.to(device)
    return larger.requires_grad_()


@torch.no_grad()
def grown_tensors(model: Motif, larger: Motif, every: int, noise_db: float, seed: int):
    """(name, tensor) of every parameter of `larger`, grown from `model`, one after the other. For a
    width of 2 and m copies of each signal head

        stream           x becomes [x, x]: the embedding [E, E], norm weights [w, w]
        its readers      [W/2 + n, W/2 - n]: q, k, v, gate, up and the head, which is then untied
        gate, up and q   have rows copied, of q the signal heads' within their groups; n is fresh
                         for every copy
        o, down          their columns copied as the heads or the MLP were, over m or 2, with noise
                         that sums to 0 over the copies; then all rows twice

    so that all copies are equal in what they compute and the noise cancels, but not in gradient:
    equal copies would stay equal for ever. In a copied layer o and down are 0."""
    c, device = model.config, model.head_weight.device
    factor = larger.config.hidden_size // c.hidden_size
    signal, new_signal = (x.num_attention_heads - x.num_noise_heads for x in (c, larger.config))
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def copied(weight, copies=factor, blocks=1):
        return copy_columns(weight, copies, blocks, 10 ** (-noise_db / 20), generator)

    yield "model.embed_tokens.weight", model.model.embed_tokens.weight.repeat(1, factor)
    sources = [(i, copy) for i in range(c.num_hidden_layers)
               for copy in ([False, True] if (i + 1) % every == 0 else [False])]
    for j, (i, copy) in enumerate(sources):
        block = model.model.layers[i]
        moved = refold_lambda_init(block.self_attn, larger.model.layers[j].self_attn)
        for name, weight in block.state_dict().items():
            part = name.split(".")[-2]
            if name in moved:
                weight = moved[name]
            elif part == "q_proj":
                weight = copied(copy_heads(weight, c, new_signal // signal))
            elif part in ("k_proj", "v_proj"):
                weight = copied(weight)
            elif part in ("gate_proj", "up_proj"):
                weight = copied(weight.repeat(factor, 1))
            elif part == "o_proj":
                weight = copied(weight, new_signal // signal, groups(c)).repeat(factor, 1)
            elif part == "down_proj":
                weight = copied(weight).repeat(factor, 1)
            else:
                weight = weight.repeat(factor if part.endswith("layernorm") else 1)
            if copy and part in ("o_proj", "down_proj"):
                weight.zero_()
            yield f"model.layers.{j}.{name}", weight
    yield "model.norm.weight", model.model.norm.weight.repeat(factor)
    if not larger.config.tie_word_embeddings:
        yield "lm_head.weight", copied(model.head_weight)


def copy_columns(weight: Tensor, copies: int, blocks: int, noise: float, generator) -> Tensor:
    """(n, blocks b) -> (n, blocks copies b): the columns of every block, `copies` times, over
    copies, plus normal noise that sums to 0 over them, its RMS `noise` times the matrix's. In fp32,
    some rows at a time, then rounded: in bf16, where W/2 is exact, W/2 + n is not."""
    out = weight.new_empty(len(weight), copies * weight.shape[1])
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rms = torch.linalg.vector_norm(weight, dtype=dtype) / weight.numel() ** 0.5 / copies
    for rows, place in zip(weight.split(4096), out.split(4096)):
        rows = upcast(rows).unflatten(1, (blocks, 1, -1)) / copies         # (rows, blocks, 1, b)
        if noise and copies > 1:
            shape = (*rows.shape[:2], copies, rows.shape[3])
            n = torch.randn(shape, dtype=dtype, device=rows.device, generator=generator)
            n -= n.mean(2, keepdim=True)
            rows = rows + n * (noise * rms * (copies / (copies - 1)) ** 0.5)
        place.copy_(rows.expand(-1, -1, copies, -1).flatten(1))
    return out


def copy_heads(weight: Tensor, c: MotifConfig, copies: int) -> Tensor:
    """q's rows (H D, hidden): in every group the signal heads `copies` times, the noise head, its
    last, once."""
    heads = weight.unflatten(0, (groups(c), -1, c.head_dim))             # (G, r + 1, D, hidden)
    r = heads.shape[1] - (c.num_noise_heads > 0)
    return torch.cat([heads[:, :r].repeat(1, copies, 1, 1), heads[:, r:]], 1).flatten(0, 2)


def refold_lambda_init(old: Attention, new: Attention) -> dict[str, Tensor]:
    """The lambda vectors and the per-head norm of layer i at place j, in fp32 (bf16 would cost
    1e-3), so that the layer computes the same: lambda_init depends on the place. With
    b = lambda_q2 . lambda_k2 and d = lambda_init(j) - lambda_init(i)

        lambda_q2 += (ln(e^b + d) - b) lambda_k2 / |lambda_k2|^2
        subln.weight *= (1 - lambda_init(i)) / (1 - lambda_init(j))

    Plain attention has none of them."""
    if not old.noise_heads:
        return {}
    found = {name: upcast(getattr(old, name)).clone() for name in LAMBDAS}
    found["subln.weight"] = upcast(old.subln.weight).clone()
    i, j = float(old.lambda_init()), float(new.lambda_init())
    if i != j:
        q2, k2 = found["lambda_q2"].double(), found["lambda_k2"].double()
        shift = torch.log1p((j - i) * torch.exp(-(q2 @ k2)))
        found["lambda_q2"] += shift * k2 / (k2 @ k2)
        found["subln.weight"] *= (1 - i) / (1 - j)
    return {f"self_attn.{name}": t for name, t in found.items()}


def init_from(c, out: Path) -> Path:
    """Make what `init` asks for -> out/init, a folder in the released layout: every rank can read
    its shards there, and no other than this process needs the memory. ValueError for what cannot
    be."""
    kind, _, what = c.init.partition(":")
    if kind == "grow":
        model = grow(Motif.from_pretrained(what, dtype=torch.float32), model_config(c), seed=c.seed)
    elif kind == "average" and re.fullmatch(r".+,[1-9]\d*", what):
        model = average(Path(what.rpartition(",")[0]), int(what.rpartition(",")[2]))
        for key, ours in asdict(model_config(c)).items():
            if getattr(model.config, key) != ours and key != "rope_theta":
                raise UserError(f"init={c.init}: that model has {key}={getattr(model.config, key)}"
                                 f", not {ours}")
    else:
        raise UserError(f"init={c.init} must be grow:PATH or average:DIR,k")
    theirs, ours = model.config.rope_theta, theta_at(c, 0)
    if theirs != ours:
        raise UserError(f"init={c.init}: that model has rope_theta={theirs}, not {ours}; keep it "
                         f"at first, and let it rise, as with --rope_theta_schedule=\"[[0, {theirs:.0f}], "
                         f"[1_000_000_000, {ours:.0f}]]\"")
    shutil.rmtree(out / "init", ignore_errors=True)
    model.save_pretrained(out / "init", SHARD_BYTES)
    print(f"first weights by {c.init}, in {out}/init", flush=True)
    return out / "init"


def average(run: Path, k: int) -> Motif:
    """The mean, in fp32, of a run's last k checkpoints. ValueError if it has not so many."""
    folders = [run / f"step_{step}" for step in sorted(checkpoint_steps(run))[-k:]]
    if len(folders) < k:
        raise UserError(f"{run} holds {len(folders)} checkpoints, not {k}; keep more of them by "
                         "--keep_last or --keep_every")
    mean = Motif.from_pretrained(folders[0], dtype=torch.float32)
    for i, folder in enumerate(folders[1:], 2):
        for ours, theirs in zip(mean.parameters(), Motif.from_pretrained(folder).parameters()):
            ours.data.lerp_(theirs.data.float(), 1 / i)
    return mean
