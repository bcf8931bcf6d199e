"""Generation: a KV cache, and the loop that draws one token after another."""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configurator import UserError
from kernels import upcast

# ---- the KV cache
#
# A token's keys and values depend on that token and those before it, never on later ones. So
# generation computes them once and keeps them. In the 12.7B model they are 2 x 16 heads x 128
# numbers per token and layer, 8 KiB in bf16, and 320 KiB a token in its 40 layers. Slot i of a row
# holds the token at position i. Rows are filled from the left and padded on the right (_ below),
# and each has its own length:
#
#     slot                  0      1      2      3
#     row 0                 The    cat    sat    _            lengths = [3, 1]
#     row 1                 Hi     _      _      _
#
# To add "on" to row 0 and "there !" to row 1 is one call of model(ids, cache=cache, row_lengths=n),
# where n = [1, 2] and the rows of ids are [on _] and [there !]:
#
#     row 0                 The    cat    sat    on           lengths = [4, 3]
#     row 1                 Hi     there  !      _
#
# What lies beyond a row's length (a padding token's keys, zeros, an earlier token's) is never seen,
# because a query sees the slots up to its own position and no further, and the next token
# overwrites it.


class KVCache:
    """Keys and values of batch_size rows of at most max_length tokens.

    keys[layer]      (B, K, slots, D): of K key heads of width D
    values[layer]    (B, P, slots, Dv): of P values of width Dv (MotifConfig.value_shape)
    lengths          (B,) int64: how many tokens each row has. The model advances it at the end of
                     each pass

    Heads come before slots, so that the matrix products read the cache as it lies.

    >>> from model import Motif, MotifConfig
    >>> model = Motif(MotifConfig())
    >>> ids = torch.tensor([[1, 2, 3, 4, 5]])
    >>> cache = KVCache(model, batch_size=1, max_length=5)
    >>> first = model(ids[:, :2], cache=cache)
    >>> rest = model(ids[:, 2:], cache=cache)
    >>> torch.allclose(torch.cat([first, rest], dim=1), model(ids), atol=1e-5)
    True
    """

    def __init__(self, model: nn.Module, batch_size: int, max_length: int):
        c = model.config
        if max_length > c.max_position_embeddings:
            raise UserError(f"prompt and new tokens need {max_length} positions, but "
                            f"max_position_embeddings={c.max_position_embeddings}; shorten them")
        weight = model.model.layers[0].self_attn.k_proj.weight
        dtype = model.compute_dtype or weight.dtype
        self.model = model
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)

        # One slot more than tokens, for padding, and a multiple of 8, for aligned products. Zeros,
        # not empty: unseen slots get a weight of 0, but 0 times NaN would be NaN.
        slots = math.ceil((max_length + 1) / 8) * 8
        num_values, value_width = c.value_shape
        key_shape = (batch_size, c.num_key_value_heads, slots, c.head_dim)
        value_shape = (batch_size, num_values, slots, value_width)
        self.keys = []
        self.values = []
        for _ in range(c.num_hidden_layers):
            self.keys.append(torch.zeros(key_shape, dtype=dtype, device=weight.device))
            self.values.append(torch.zeros(value_shape, dtype=dtype, device=weight.device))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        return sum(t[0, :, 0].nbytes for t in self.keys + self.values)

    def layers_for_pass(self, positions: Tensor, row_lengths: Tensor | None) -> "list[LayerCache]":
        """What each layer needs for a pass over tokens at these positions (B, T)."""
        T = positions.shape[1]
        visible = self.keys[0].shape[2]

        # Padding whose position is beyond the last slot goes into that slot: it is a spare one.
        slots = positions.clamp(max=visible - 1)

        # A step, T = 1, uses all slots, however few are full: its shapes are fixed and the host
        # need not ask the GPU for the lengths, as a CUDA graph demands (CudaGraph, below). So the
        # caller must not make more steps than fit: on a GPU that is not checked (Decoder counts
        # them).
        was_empty = False
        if T > 1:
            longest = int(self.lengths.max())
            was_empty = longest == 0
            visible = min(longest + T, visible)
        if T > 1 or self.lengths.device.type == "cpu":
            new = T if row_lengths is None else row_lengths
            if int((self.lengths + new).max()) > self.max_length:
                raise ValueError(f"a row would exceed the cache's {self.max_length} tokens")
        return [LayerCache(keys[:, :, :visible], values[:, :, :visible], slots, was_empty)
                for keys, values in zip(self.keys, self.values)]

    def select_rows(self, rows: Tensor | list[int], max_length: int | None = None) -> "KVCache":
        """A new cache with copies of these rows, which may repeat, and room for max_length tokens
        (None: as before)."""
        if max_length is None:
            max_length = self.max_length
        rows = torch.as_tensor(rows, device=self.lengths.device)
        selected = KVCache(self.model, len(rows), max_length)
        selected.lengths = self.lengths[rows]
        longest = int(selected.lengths.max())
        if longest > max_length:
            raise ValueError(f"a row has more than {max_length} tokens")
        for i in range(len(self.keys)):
            selected.keys[i][:, :, :longest] = self.keys[i][rows, :, :longest]
            selected.values[i][:, :, :longest] = self.values[i][rows, :, :longest]
        return selected

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows, layer by layer, so that there are never two whole caches."""
        self.lengths = self.lengths[rows]
        for i in range(len(self.keys)):
            self.keys[i] = self.keys[i][rows]
            self.values[i] = self.values[i][rows]


class LayerCache(NamedTuple):
    """One layer of a KVCache during one forward pass."""
    keys: Tensor            # (B, K, S, D): the slots that the new tokens may look at
    values: Tensor          # (B, P, S, Dv)
    slots: Tensor           # (B, T): where the new tokens go
    was_empty: bool         # the new tokens, more than one, are known to be the first

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys (B, T, K, D) and values (B, T, P, Dv) of the new tokens -> the keys and
        values that they look at, (B, S, K, D) and (B, S, P, Dv), and each query's slot (B, T).

        In an empty cache they look at each other, as in training, and need no slots: causal
        attention of T queries over T keys, which kernels.py may fuse."""
        # keys[rows, :, slots] is (B, T, K, D), as k is: where a slice stands between two indices,
        # PyTorch puts the indexed dimensions first.
        rows = torch.arange(k.shape[0], device=k.device)[:, None]        # (B, 1)
        self.keys[rows, :, self.slots] = k
        self.values[rows, :, self.slots] = v
        if self.was_empty:
            return k, v, None
        return self.keys.transpose(1, 2), self.values.transpose(1, 2), self.slots


# ---- generation
#
# First the model processes the prompts, many tokens in a pass. Then each step processes one token
# of each row and draws the next. A step multiplies every weight with only B vectors, so it need not
# take longer than the GPU's memory takes to deliver the weights, 8 ms for 25 GB at 3.3 TB/s. But
# Python and the launching of hundreds of small kernels do take longer; hence the CUDA graph: one
# step is recorded and from then on replayed whole. A graph replays fixed kernels on fixed memory,
# which is why a step looks at all slots of the cache and keeps the lengths on the GPU.

PREFILL_TOKENS = 2**14      # prompt tokens in one forward pass, over all rows


class Decoder:
    """Draws one token after another for a batch of prompts.

    ids (B, T)             prompts, padded on the right
    max_new_tokens         how often next_tokens can be called
    temperature            0 is greedy
    top_k                  draw from the top_k likeliest tokens, and those that are as likely as
                           the last of these; None: from all
    seed                   makes the draws repeatable; None: torch's global generator
    prompt_lengths (B,)    tokens of each prompt; None: all T
    row_seeds              one for each row, so that what a row draws does not depend on the others
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = None,
                 prompt_lengths: Tensor | None = None, row_seeds: list[int] | None = None):
        B, T = ids.shape
        if row_seeds is not None and (len(row_seeds) != B or seed is not None):
            raise ValueError(f"row_seeds must be {B}, one for each row, and go without seed")
        if ids.numel() == 0 or max_new_tokens < 0 or temperature < 0:
            raise UserError("generate needs a token to begin with, max_new_tokens >= 0 and "
                            "temperature >= 0")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {top_k}")
        self.model = model
        self.remaining = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(ids.device).manual_seed(seed)

        self.uniforms = None         # (B, max_new_tokens): a number in [0, 1) for each draw
        if row_seeds is not None:
            rows = []
            for row_seed in row_seeds:
                generator = torch.Generator().manual_seed(row_seed)
                rows.append(torch.rand(max_new_tokens, generator=generator))
            self.uniforms = torch.stack(rows).to(ids.device)

        max_length = T + max(0, max_new_tokens - 1)       # the last new token is drawn only
        self.cache = KVCache(model, B, max_length)
        self.graph = None            # the CUDA graph of a step, recorded at the first one
        self.new = None              # the tokens drawn last, (B, 1), which are not yet in the cache
        self.logits = self.prefill(ids, prompt_lengths)                  # (B, 1, V)

    def prefill(self, ids: Tensor, prompt_lengths: Tensor | None) -> Tensor:
        """Process the prompts -> logits after the last token of each, (B, 1, V)."""
        B, T = ids.shape
        if prompt_lengths is None:
            prompt_lengths = torch.full((B,), T, device=ids.device)
        width = max(1, PREFILL_TOKENS // B)
        logits = None
        for start in range(0, T, width):
            piece = ids[:, start:start + width]
            n = (prompt_lengths - start).clamp(0, piece.shape[1])        # (B,) tokens in the piece
            new_logits = self.model(piece, cache=self.cache, row_lengths=n, last_only=True)
            if logits is None:
                logits = new_logits
            # A prompt that ended in an earlier piece keeps its logits from there.
            logits = torch.where((n > 0)[:, None, None], new_logits, logits)
        return logits

    @torch.no_grad()
    def next_tokens(self) -> Tensor:
        """One more token of each row: (B, 1)."""
        if self.remaining == 0:
            raise ValueError("max_new_tokens have been drawn; there is no room for more")
        uniform = None
        if self.uniforms is not None:
            uniform = self.uniforms[:, -self.remaining, None]                # (B, 1)
        self.remaining -= 1
        if self.new is not None:
            self.logits = self.step(self.new)
        self.new = sample_next_token(upcast(self.logits[:, -1]), self.temperature, self.top_k,
                                     self.generator, uniform)
        return self.new

    def step(self, new: Tensor) -> Tensor:
        """Process one token of each row (B, 1) -> logits of the next, (B, 1, V)."""
        model_step = functools.partial(self.model, cache=self.cache)
        # FSDP2, which has a compute_dtype, gathers weights as it goes: no graph can hold that.
        if not new.is_cuda or self.model.compute_dtype is not None:
            return model_step(new)
        if self.graph is None:
            self.graph = CudaGraph(model_step, new, self.cache.lengths)
        return self.graph(new)

    def keep_rows(self, rows: Tensor | list[int]) -> None:
        """Go on with these rows alone, because the others have ended."""
        rows = torch.as_tensor(rows, device=self.logits.device)
        self.graph = None            # it has the shapes of all rows
        self.logits = self.logits[rows]
        self.cache.keep_rows(rows)
        if self.uniforms is not None:
            self.uniforms = self.uniforms[rows]
        if self.new is not None:
            self.new = self.new[rows]


def sample_next_token(logits: Tensor, temperature: float, top_k: int | None,
                      generator: torch.Generator | None, uniform: Tensor | None = None) -> Tensor:
    """Draw from softmax(logits / temperature) of each row: (B, V) -> (B, 1). With `uniform` (B, 1),
    a number in [0, 1) for each row, no generator is used: the row's probabilities are laid end to
    end on [0, 1), and the token whose interval contains the number is drawn.

    >>> logits = torch.tensor([[0.2, 0.5, 0.3]]).log()          # shares end at 0.2, 0.7 and 1
    >>> sample_next_token(logits, 1.0, None, None, uniform=torch.tensor([[0.6]]))
    tensor([[1]])
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        most = min(top_k, logits.shape[1])
        least = logits.topk(most).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if uniform is not None:
        ends = probabilities.cumsum(-1)
        token = torch.searchsorted(ends, uniform * ends[:, -1:], right=True)
        return token.clamp(max=logits.shape[1] - 1)     # as uniform * end is rounded
    return torch.multinomial(probabilities, 1, generator=generator)


class CudaGraph:
    """function(x), recorded as a CUDA graph when it is made and replayed at every call.

    lengths: a tensor that the function advances, which recording leaves as it was."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, lengths: Tensor):
        self.input = x.clone()
        before = lengths.clone()

        # Libraries allocate at their first calls, which must happen before the recording, on a
        # stream of their own. These calls write only slots that the first real step overwrites.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(self.input)
                lengths.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)

        # Recording executes nothing, so the lengths stay those from before the step.
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output
