"""Growth: a larger model that computes the same as a smaller one, as first weights for training.

Motif-2-12.7B did not start from random weights. It grew out of Motif-2.6B (arXiv 2511.07464), so
that the FLOPs that the small model had cost were not lost: the large model starts with the small
one's loss, and has room to improve. `python pretrain.py config/X.py --init=grow:PATH` does that.
What follows shows how a transformer is made wider and deeper without a change in its logits.

1. Width (HyperCloning, arXiv 2409.12903). The residual stream holds everything twice: where the
   small model has x, the large one has [x; x]. RMSNorm treats both halves as it treats x, because
   the mean of the squares is the same. Every matrix W that reads the stream takes half of its input
   from each half, and every matrix that writes to it writes its result y twice:

        reads:      [W/2 + n, W/2 - n] [x; x]  =  (W/2 + n) x + (W/2 - n) x  =  W x
        writes:     [W; W] z  =  [y; y]

   The first line is exact for any n, and n must not be zero. With n = 0 the two copies are equal
   and get equal gradients, and Newton-Schulz keeps them equal: they would stay equal for ever, and
   the large model would be a small one. The noise n breaks the tie. (A matrix that writes needs no
   noise: both copies of its result are read with different weights, so their gradients differ.)
   The RMS of n is 0.32 of that of W/2, 10 dB below it [ours: unpublished]. MEASUREMENTS.md,
   Growth, has what happens without.

   The MLP widens in the same way: gate and up have their rows twice, and down reads both copies.
   PolyNorm of a vector twice is PolyNorm of the vector, twice, for the same reason as RMSNorm.

2. Heads. Plain differential attention (1 signal head for each noise head) becomes grouped (4 for
   1): each signal head is copied 4 times within its group, each noise head is kept once, key and
   value heads are unchanged. The 4 copies give the same output, so o_proj takes a quarter of each:
   [O/4 + n1, O/4 + n2, O/4 + n3, O/4 + n4] with n1 + n2 + n3 + n4 = 0.

3. Depth (LLaMA-Pro, arXiv 2401.02415). After every 4 layers comes a copy of the last of them, in
   which o_proj and down_proj are zero. It adds nothing to the stream: it is the identity. It can
   learn from there, since the gradients of o_proj and down_proj are not zero.

   A layer that moves up needs one correction, because lambda's initial value, lambda_init in
   model.py, depends on the layer's number: keep_lambda derives it.

From Motif-2.6B to Motif-2-12.7B, rows x columns:

    embed_tokens   219520 x 2048 -> 219520 x 4096   [E, E]
    q_proj           2048 x 2048 ->   5120 x 4096   8 + 8 heads of 128 become 32 + 8; reads
    k_proj, v_proj   2048 x 2048 ->   2048 x 4096   reads
    o_proj           2048 x 2048 ->   4096 x 8192   8 heads of 256 become 32; writes
    gate, up         8192 x 2048 ->  16384 x 4096   rows twice; reads
    down_proj        2048 x 8192 ->   4096 x 16384  columns twice; writes
    lm_head        219520 x 2048 -> 219520 x 4096   reads, and so is tied to [E, E] no longer
    norms                   2048 ->   4096          [w, w]
    layers                    32 -> 40              a copy after every 4
"""
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError
from kernels import upcast
from model import LAMBDAS, Attention, Motif, MotifConfig
from pretrain import FILE_BYTES, model_config, theta_at
from support.run_folder import checkpoint_steps, latest_checkpoint
from support.weights import read_json, save_one_by_one


NOISE_DB = 10.0     # how far the noise between copies lies below the divided weights [ours]


def grow(model: Motif, config: MotifConfig, noise_db: float = NOISE_DB, seed: int = 0) -> Motif:
    """Grow the model to config's shape; its logits stay the same.

    noise_db: how far the noise between copies lies below the divided weights, such as W/2; math.inf
    for no noise. It is drawn on the model's device from the seed. The grown model shares no memory
    with the model, and has its device and dtypes, except that lambda vectors and per-head norms are
    fp32. rope_theta stays the model's, since another one would change the logits. UserError if the
    shape cannot be reached."""
    config = replace(config, rope_theta=model.config.rope_theta)
    every = check_growth(model.config, config)
    return build_grown(model, config, every, noise_db, seed)


# ---- width: what happens to one matrix

def copy_columns(weight: Tensor, copies: int, blocks: int = 1, noise: float = 0.0,
                 generator: torch.Generator | None = None) -> Tensor:
    """Let a matrix read `copies` copies of its input: (n, blocks b) -> (n, blocks copies b).

    Each copy of the columns is the matrix divided by `copies`, plus normal noise that sums to zero
    over the copies. noise: its RMS as a fraction of that of the divided matrix. blocks: how many
    blocks the columns are cut into, each followed by its own copies, as the heads of a group are.

    >>> W = torch.tensor([[1., 2.], [3., 4.]])
    >>> copy_columns(W, copies=2)
    tensor([[0.5000, 1.0000, 0.5000, 1.0000],
            [1.5000, 2.0000, 1.5000, 2.0000]])

    >>> x = torch.tensor([5., 6.])
    >>> W @ x
    tensor([17., 39.])
    >>> wide = copy_columns(W, copies=2, noise=0.3, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(wide @ torch.cat([x, x]), W @ x)
    True
    >>> bool((wide[:, :2] == wide[:, 2:]).any())         # but no two copies of a weight are equal
    False
    """
    out = weight.new_empty(len(weight), copies * weight.shape[1])
    # fp32 at least: in bf16 W/2 is exact, but W/2 + n is not. It is rounded once, at the end.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rms = torch.linalg.vector_norm(weight, dtype=dtype) / weight.numel() ** 0.5 / copies

    # Some rows at a time, so that little memory is needed beside the two matrices.
    for rows, out_rows in zip(weight.split(4096), out.split(4096)):
        rows = upcast(rows).unflatten(1, (blocks, 1, -1)) / copies       # (rows, blocks, 1, b)
        if noise and copies > 1:
            shape = (*rows.shape[:2], copies, rows.shape[3])
            n = torch.randn(shape, dtype=dtype, device=rows.device, generator=generator)
            n -= n.mean(2, keepdim=True)
            # Without its mean, noise keeps 1 - 1/copies of its variance. The root restores it.
            rows = rows + n * (noise * rms * (copies / (copies - 1)) ** 0.5)
        out_rows.copy_(rows.expand(-1, -1, copies, -1).flatten(1))
    return out


def copy_heads(weight: Tensor, config: MotifConfig, copies: int) -> Tensor:
    """Copy the signal heads among q_proj's rows: within each group the signal heads `copies` times,
    then the noise head, which is the group's last head, once. (H D, hidden) -> (H' D, hidden)."""
    heads = weight.unflatten(0, (num_groups(config), -1, config.head_dim))   # (G, r + 1, D, hidden)
    r = heads.shape[1]
    if config.num_noise_heads:
        r -= 1
    signal = heads[:, :r].repeat(1, copies, 1, 1)
    noise = heads[:, r:]
    return torch.cat([signal, noise], 1).flatten(0, 2)


def num_groups(config: MotifConfig) -> int:
    """Groups of query heads: one for each noise head, or, if there is none, for each key head."""
    return config.num_noise_heads or config.num_key_value_heads


# ---- depth: where each layer comes from, and what its new number changes

def layer_sources(layers: int, every: int) -> list[tuple[int, bool]]:
    """For each layer of the grown model: the layer that it comes from, and whether it is an added
    copy.

    >>> layer_sources(4, every=2)
    [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
    """
    sources = []
    for i in range(layers):
        sources.append((i, False))
        if (i + 1) % every == 0:
            sources.append((i, True))
    return sources


def keep_lambda(old: Attention, new: Attention) -> dict[str, Tensor]:
    """The lambda vectors and the per-head norm of layer i for its new place j >= i -> name: tensor.

    A layer's number enters its attention in two places, as lambda_init:

        lambda  =  exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        out     =  subln.weight * RMSNorm(signal - lambda noise) * (1 - lambda_init)

    lambda_init grows by d = lambda_init(j) - lambda_init(i) >= 0. For lambda to stay, with
    b = lambda_q2 . lambda_k2, the second exponential must grow by d too: e^b' = e^b + d. So

        b' - b  =  ln(e^b + d) - b  =  ln(1 + d e^-b)

    Moving lambda_q2 by t lambda_k2 adds t |lambda_k2|^2 to b, hence t = (b' - b) / |lambda_k2|^2.
    For out to stay, subln.weight takes the factor (1 - lambda_init(i)) / (1 - lambda_init(j)).

    The result is fp32 in any model: rounding to bf16 would change the logits by 1e-3. Plain
    attention has no lambda, and gets an empty dict."""
    if not old.noise_heads:
        return {}
    tensors = {name: upcast(getattr(old, name)).clone() for name in LAMBDAS}
    tensors["subln.weight"] = upcast(old.subln.weight).clone()

    old_init = float(old.initial_lambda())
    new_init = float(new.initial_lambda())
    if old_init != new_init:
        q2 = tensors["lambda_q2"].double()
        k2 = tensors["lambda_k2"].double()
        b = q2 @ k2
        growth_of_b = torch.log1p((new_init - old_init) * torch.exp(-b))
        tensors["lambda_q2"] += growth_of_b * k2 / (k2 @ k2)
        tensors["subln.weight"] *= (1 - old_init) / (1 - new_init)
    return {f"self_attn.{name}": tensor for name, tensor in tensors.items()}


# ---- the grown model

@dataclass
class Growth:
    """How many copies are made of each part."""
    config: MotifConfig                 # of the model that grows
    width: int                          # copies of the stream's and of the MLP's features
    head_copies: int                    # copies of each signal head
    noise: float                        # see copy_columns
    generator: torch.Generator | None   # draws the noise; None on the meta device

    def read_copies(self, weight: Tensor, copies: int, blocks: int = 1) -> Tensor:
        """The matrix, reading `copies` copies of its input."""
        return copy_columns(weight, copies, blocks, self.noise, self.generator)

    def grow_tensor(self, name: str, weight: Tensor) -> Tensor:
        """One tensor of a layer, by its name in the layer; not the lambda vectors and subln."""
        module = name.split(".")[-2]
        if module == "q_proj":
            return self.read_copies(copy_heads(weight, self.config, self.head_copies), self.width)
        if module in ("k_proj", "v_proj"):
            return self.read_copies(weight, self.width)
        if module in ("gate_proj", "up_proj"):
            return self.read_copies(weight.repeat(self.width, 1), self.width)
        if module == "o_proj":
            groups = num_groups(self.config)
            return self.read_copies(weight, self.head_copies, groups).repeat(self.width, 1)
        if module == "down_proj":
            return self.read_copies(weight, self.width).repeat(self.width, 1)
        if module.endswith("layernorm"):
            return weight.repeat(self.width)
        return weight.clone()           # PolyNorm's scalars


def build_grown(model: Motif, config: MotifConfig, every: int, noise_db: float = NOISE_DB,
                seed: int = 0) -> Motif:
    """The model grown to a shape that check_growth has passed, with a layer copied after every
    `every`. Beside the two models about one matrix is in memory."""
    with torch.device("meta"):
        larger = Motif(config)
    tensors = dict(grown_tensors(model, larger, every, noise_db, seed))
    larger.load_state_dict(tensors, assign=True)

    # The layers' numbers are not in the state dict: they go to the device on their own.
    device = model.model.layers[0].self_attn.layer.device
    for block in larger.model.layers:
        block.self_attn.layer = block.self_attn.layer.to(device)
    return larger.requires_grad_()


@torch.no_grad()
def grown_tensors(model: Motif, larger: Motif, every: int, noise_db: float,
                  seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `larger`, one after the other."""
    old = model.config
    new = larger.config
    device = model.head_weight.device
    generator = None
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
    growth = Growth(
        config=old,
        width=new.hidden_size // old.hidden_size,
        head_copies=num_signal_heads(new) // num_signal_heads(old),
        noise=10 ** (-noise_db / 20),
        generator=generator)

    yield "model.embed_tokens.weight", model.model.embed_tokens.weight.repeat(1, growth.width)

    for j, (i, is_copy) in enumerate(layer_sources(old.num_hidden_layers, every)):
        block = model.model.layers[i]
        kept = keep_lambda(block.self_attn, larger.model.layers[j].self_attn)
        for name, weight in block.state_dict().items():
            if name in kept:
                grown = kept[name]
            else:
                grown = growth.grow_tensor(name, weight)
            if is_copy and name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                grown.zero_()
            yield f"model.layers.{j}.{name}", grown

    yield "model.norm.weight", model.model.norm.weight.repeat(growth.width)
    if not new.tie_word_embeddings:
        yield "lm_head.weight", growth.read_copies(model.head_weight, growth.width)


def num_signal_heads(config: MotifConfig) -> int:
    return config.num_attention_heads - config.num_noise_heads


# What must not differ between the two models, and why.
UNCHANGED = {
    "vocab_size": "new words would take a share of every probability",
    "num_noise_heads": "every noise head is kept once",
    "num_key_value_heads": "key and value heads are not copied",
    "head_dim": "heads do not grow wider",
    "activation": "it is another function",
    "rms_norm_eps": "it is another function",
    "attn_rms_norm_eps": "it is another function",
}


def check_growth(old: MotifConfig, new: MotifConfig) -> int:
    """Can a model of shape `old` grow to `new`? -> after every how many layers one is copied (more
    than there are, if none is). UserError that names every key which cannot be reached."""
    new.check()
    problems = {}
    for key, why in UNCHANGED.items():
        if getattr(old, key) != getattr(new, key):
            problems[key] = why

    factor = new.hidden_size // old.hidden_size
    if factor < 1 or new.hidden_size != factor * old.hidden_size:
        problems["hidden_size"] = "it must be a multiple"
    elif new.intermediate_size != factor * old.intermediate_size:
        problems["intermediate_size"] = f"it must grow as hidden_size does, {factor} times"
    if num_signal_heads(new) % num_signal_heads(old):
        problems["num_attention_heads"] = (f"{num_signal_heads(new)} signal heads are not a "
                                           f"multiple of {num_signal_heads(old)}")
    if new.tie_word_embeddings and (factor > 1 or not old.tie_word_embeddings):
        problems["tie_word_embeddings"] = "a wider or an untied model's head is not its embedding"

    layers = old.num_hidden_layers
    copies = new.num_hidden_layers - layers
    every = layers // copies if 0 < copies <= layers else layers + 1
    if layers // every != copies:
        reachable = sorted({layers + layers // n for n in range(1, layers + 1)})
        counts = ", ".join(str(count) for count in reachable)
        problems["num_hidden_layers"] = f"copies after every 1, 2, ... layers make {counts}"

    if problems:
        told = [f"{key}={getattr(old, key)} cannot grow to {getattr(new, key)}: {why}"
                for key, why in problems.items()]
        raise UserError("; ".join(told))
    if factor == 1 and copies == 0 and num_signal_heads(new) == num_signal_heads(old):
        print("note: the new model is no larger than the one that it grows from", flush=True)
    return every


# ---- first weights for pretrain.py --init

def init_from(c, out: Path) -> Path:
    """Make the first weights that the pretrain.Config c asks for by `init` -> the folder out/init.

    grow:PATH grows a model to the config's shape. PATH is its folder, or that of a run, whose
    newest checkpoint is taken. average:DIR,k takes the mean of the last k checkpoints of the run in
    DIR. The folder out/init has the released layout: each rank can read its own shards from it, so
    that only the process that calls this holds a whole model."""
    kind, _, what = c.init.partition(":")
    is_average = kind == "average" and re.fullmatch(r".+,[1-9]\d*", what)
    if kind != "grow" and not is_average:
        raise UserError(f"init={c.init} must be grow:PATH or average:DIR,k")
    folder = out / "init"
    if kind == "grow":
        if Path(what).resolve() == folder.resolve():
            raise UserError(f"init={c.init} would overwrite the model that it reads; move it")
        newest = latest_checkpoint(Path(what))
        what = newest.folder if newest else what
        model = Motif.from_pretrained(what)
    else:
        run, _, k = what.rpartition(",")
        model = average(Path(run), int(k))
        check_same_shape(c, model)
    check_same_theta(c, model)

    if kind == "grow":
        grow_into(folder, model, model_config(c), c.seed)
    else:
        model.save_pretrained(folder, FILE_BYTES)
    print(f"first weights by {kind}:{what}, in {folder}", flush=True)
    return folder


@torch.no_grad()
def grow_into(folder: Path, model: Motif, config: MotifConfig, seed: int) -> None:
    """Write what grow(model, config, seed=seed) returns into the folder, in fp32. Beside the model,
    which becomes fp32 too, only the tensors of one file are in memory: some 5 GB."""
    config = replace(config, rope_theta=model.config.rope_theta)
    every = check_growth(model.config, config)
    with torch.device("meta"):
        larger = Motif(config)
    config_file = larger.config.to_dict() | {"torch_dtype": "float32"}
    print(f"growing to {sum(p.numel() for p in larger.parameters()):,d} parameters, in {folder}",
          flush=True)
    tensors = grown_tensors(model.float(), larger, every, NOISE_DB, seed)
    save_one_by_one(folder, "model", larger.state_dict(), tensors, FILE_BYTES,
                    {"config.json": config_file})


def average(run: Path, k: int) -> Motif:
    """The mean, in fp32, of the last k checkpoints of a run. Motif-2.6B trained on from the mean of
    its last six every 8B tokens (arXiv 2508.09148)."""
    folders = [run / f"step_{step}" for step in sorted(checkpoint_steps(run))[-k:]]
    if len(folders) < k:
        raise UserError(f"{run} holds {len(folders)} checkpoints, not {k}; keep more of them with "
                        "--keep_last or --keep_every")
    check_same_config(run, folders)
    mean = Motif.from_pretrained(folders[0], dtype=torch.float32)
    for i, folder in enumerate(folders[1:], 2):
        other = Motif.from_pretrained(folder)
        # The mean of i models is that of i - 1 models, moved 1/i of the way to the next.
        for p, q in zip(mean.parameters(), other.parameters()):
            p.data.lerp_(q.data.float(), 1 / i)
    return mean


def check_same_config(run: Path, folders: list[Path]) -> None:
    """UserError unless all checkpoints have the same config.json, apart from its dtype. The same
    weights compute something else with another RoPE base or eps, so that a mean fits neither."""
    first = MotifConfig.from_dict(read_json(folders[0] / "config.json"))
    for folder in folders[1:]:
        config = MotifConfig.from_dict(read_json(folder / "config.json"))
        for key, expected in asdict(first).items():
            found = getattr(config, key)
            if found != expected:
                raise UserError(f"init=average:{run},{len(folders)}: {folders[0].name} has "
                                f"{key}={expected}, and {folder.name} has {found}; average fewer "
                                "of the last checkpoints")


def check_same_shape(c, model: Motif) -> None:
    """UserError unless the averaged model has the config's shape. rope_theta is checked apart, and
    poly_norm_scale concerns fresh weights alone."""
    for key, expected in asdict(model_config(c)).items():
        found = getattr(model.config, key)
        if found != expected and key not in ("rope_theta", "poly_norm_scale"):
            raise UserError(f"init={c.init}: that model has {key}={found}, not {expected}")


def check_same_theta(c, model: Motif) -> None:
    """UserError unless the run begins with the model's RoPE base: another one would change what
    the model computes."""
    found = model.config.rope_theta
    expected = theta_at(c, 0)
    if found != expected:
        schedule = f"[[0, {found:.0f}], [1_000_000_000, {expected:.0f}]]"
        raise UserError(f"init={c.init}: that model has rope_theta={found}, not {expected}; begin "
                        f'with its own and let it rise, as in --rope_theta_schedule="{schedule}"')
