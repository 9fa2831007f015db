"""A small decoder whose layers start from a teacher's, by least squares: a BERT read into a Mistral.

The two differ in all parts: norms behind a block and in front, biases and none, learned positions and rotary ones,
GELU and SwiGLU, other tokens. So nothing is copied. Each block's weights are solved for, one after the other, from what
the teacher computes on real text and from what the decoder computes so far, so that later blocks mend earlier ones.

- Norms: the teacher's state behind a block is `gain * n + bias`, n of unit size. The decoder's residual stream holds
  `size * scale * n`: a gain that the teacher multiplies into its residual is divided out of all later writing instead
  (`scale`, one number a channel, known beforehand), and the size may differ from token to token, since the next norm
  takes it away. A few tokens whose size would grow without bound are held near the others'.
- Biases: a stretch of the stream along `scale` itself is constant; n has no mean, so nothing else lies there.
- Queries and keys: a head's bilinear form is cut to its largest directions, which take the rotary pairs that hardly
  turn within a text. The pairs that turn fast hold what is left of a head's scores by distance.
- Positions: heads of the first layer that the teacher has no counterpart for weigh the first token against the last,
  by a curve of the place. Elsewhere such heads take the mean over the text.
- GELU(x) is about silu(1.702 x) / 1.702, a SwiGLU whose other factor is the token's size. Of the teacher's neurons the
  ones that matter most are kept, and what they write is solved for again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.model.config import LatentAttention, ModelConfig
from nvembed_deploy.model.decoder import Attention, Decoder, DecoderLayer, RMSNorm, rotate
from nvembed_deploy.model.family import read_architecture
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.student import contract, nvembed_config
from nvembed_deploy.training.teacher import Teacher
from recipes.mini.bert_states import Batch, bert_of, calibration, norms_of, token_rows, unit
from recipes.mini.least_squares import fit, largest_directions, root, solve

TEXTS_AT_A_TIME = 32
CALIBRATION_TOKENS = 200_000
"""Most tokens that weights are solved for on: the teacher's states of them are in memory."""
TOKENS_A_FEATURE = 10
"""Least tokens for each number that a matrix reads: with fewer, it would fit these texts alone."""
CONSTANT = 0.2
"""Size of the constant beside n, whose root mean square is 1."""
SLOW_TURN, NEAR = 0.5, 128
"""Radians that a rotary pair may turn within so many tokens to hold what a head compares."""
PLACES = 40
"""First places of a text whose mean a token's row is."""
FARTHEST = 40
"""Tokens of distance by which a head's scores are fitted."""
FITTED_SHARE = 4
"""Every such batch of the calibration is looked at for that."""
GELU_SLOPE = 1.702
SIZE_SPREAD = 0.2
"""How far a token's size may lie from the median's, as a logarithm."""
LEAST_GAIN = 0.05
CURVES = (2.0, 150.0)
"""Places at which the first and the last position head weigh both ends alike."""
CURVE_SLOPE, CURVE_LIMIT, CURVE_PLACES = 1.5, 6.0, 384
BOS_ID, EOS_ID = 1, 2
END_SCORE = 40.0
"""What both ends score above all other tokens in a position head."""


@dataclass(frozen=True, kw_only=True)
class Transplant:
    """A decoder to go on from."""

    weights: dict[str, Tensor]
    """Of a `Decoder`, float32."""
    agreement: float
    """Mean cosine of the means over tokens to the teacher's, which runs on the same tokens of the calibration texts."""


def transplant(
    teacher: Teacher,
    texts: Sequence[str],
    *,
    config: dict[str, Any],
    tokenizer_json: str,
    max_length: int,
) -> Transplant:
    """Makes a bidirectional decoder that computes nearly what a teacher computes.

    Args:
        teacher: A BERT.
        texts: Real text to solve on; the first ones up to `CALIBRATION_TOKENS`.
        config: Fields of `MistralConfig`; width, layers and head width are the teacher's, heads as many or more.
        tokenizer_json: Content of the decoder's `tokenizer.json`.
        max_length: Most tokens of a text.

    Raises:
        ConfigError: The teacher is no BERT, or of other sizes, or the texts are too few.
    """
    sizes = read_architecture(nvembed_config(config, LatentAttention(head_dim=config["hidden_size"])))
    encoder = TextEncoder(tokenizer_json.encode(), contract(sizes))
    tokenized = encoder.tokenize(texts, max_length=max_length)
    ends = itertools.accumulate(map(len, tokenized))
    tokenized = sorted((row for row, end in zip(tokenized, ends, strict=True) if end <= CALIBRATION_TOKENS), key=len)
    parts = [tokenized[start : start + TEXTS_AT_A_TIME] for start in range(0, len(tokenized), TEXTS_AT_A_TIME)]
    bert, rows = bert_of(teacher), token_rows(Tokenizer.from_str(tokenizer_json), teacher)
    batches = list(calibration(bert, rows, (encoder.pad(part) for part in parts)))
    solver = _Solver(bert, sizes, rows, batches)
    return Transplant(weights=solver.run(), agreement=solver.agreement())


class _Solver:
    """Solves for a decoder's weights, layer by layer.

    Args:
        bert: Of the decoder's width and head width.
        config: The decoder's sizes.
        rows: See `token_rows`.
        batches: Calibration text, see `calibration`.
    """

    def __init__(self, bert: Any, config: ModelConfig, rows: Tensor, batches: Sequence[Batch]) -> None:
        self.bert, self.config, self.batches = bert, config, batches
        stated = self.bert.config
        width, heads = stated.hidden_size, stated.num_attention_heads
        asked = (config.hidden_size, config.layers, config.kv_heads, config.head_dim)
        given = (width, stated.num_hidden_layers, config.heads, width // heads)
        if asked != given or config.heads < heads:
            raise ConfigError(
                f"width, layers, key/value heads and their width are {asked}; from this teacher they must be {given}, "
                f"with {heads} heads or more"
            )
        tokens = sum(int(batch.real.sum()) for batch in batches)
        least = TOKENS_A_FEATURE * max(width, config.intermediate_size)
        if tokens < least:
            raise ConfigError(f"the texts have {tokens} tokens; layers of this size need {least}; pass more text")
        self.heads = heads
        self.norms = norms_of(self.bert)
        self.decoder = Decoder(config).requires_grad_(False)
        self.decoder.embed_tokens.weight.copy_(self._table(rows) + CONSTANT)
        self.stream = [self.decoder.embed_tokens(batch.ids) for batch in batches]
        self.scale = torch.ones(width)
        self.constant = CONSTANT

    @torch.no_grad()
    def _table(self, rows: Tensor) -> Tensor:
        """What the teacher's first norm makes of each token at the mean of a text's first places; `<s>` at its own."""
        embeddings = self.bert.embeddings
        places = embeddings.position_embeddings.weight
        table = rows + embeddings.token_type_embeddings.weight[0] + places[1 : PLACES + 1].mean(dim=0)
        table[BOS_ID] += places[0] - places[1 : PLACES + 1].mean(dim=0)
        return unit(table)[0]

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """Solves for everything and returns the decoder's weights."""
        work = list(zip(self.decoder.layers, self.bert.encoder.layer, strict=True))
        for number, (own, other) in enumerate(tqdm(work, desc="layers from the teacher's", disable=None)):
            self._attention(own, other, 2 * number, first=number == 0)
            self._feed_forward(own, other, 2 * number + 1)
        normed, wanted = self._known(self._normed(self.decoder.norm)), self._targets(-1)
        self.decoder.norm.weight.mul_((normed * wanted).sum(dim=0) / normed.square().sum(dim=0))
        return self.decoder.state_dict()

    @torch.no_grad()
    def agreement(self) -> float:
        """Mean cosine of the means over tokens, student to teacher, on the calibration text."""
        found = []
        for batch, stream in zip(self.batches, self.stream, strict=True):
            hidden, known = self.decoder.norm(stream), batch.real[:, :, None]
            wanted = batch.states[-1] * self.norms[-1].weight + self.norms[-1].bias
            found.append(F.cosine_similarity((hidden * known).sum(1), (wanted * known).sum(1), dim=-1))
        return float(torch.cat(found).mean())

    def _normed(self, norm: RMSNorm) -> list[Tensor]:
        """What a block reads, its norm's weights made so that it is n again and of about its size."""
        norm.weight.copy_(1 / self.scale)
        size = self._known([norm(x) for x in self.stream]).square().mean().sqrt()
        norm.weight.div_(size)
        return [norm(x) for x in self.stream]

    def _known(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor[batch.real] for tensor, batch in zip(tensors, self.batches, strict=True)])

    def _units(self, place: int) -> Tensor:
        return torch.cat([batch.states[place][batch.real] for batch in self.batches])

    def _targets(self, place: int) -> Tensor:
        """The teacher's state behind a norm, [N, D]."""
        return self._units(place) * self.norms[place].weight + self.norms[place].bias

    def _sizes(self, place: int) -> Tensor:
        """How much of the teacher's n the stream holds, [N, 1]."""
        units = self._units(place)
        held = self._known(self.stream) / self.scale
        held = held - held.mean(dim=-1, keepdim=True)
        return (held * units).sum(dim=-1, keepdim=True) / units.square().sum(dim=-1, keepdim=True)

    def _write(self, features: Tensor, place: int, sizes: Tensor) -> Tensor:
        """Weights [D, F] by which features bring the stream from the teacher's state at `place` to the next one."""
        after = place + 1
        before = sizes.mean()
        self.scale = self.scale / self.norms[place].weight.abs().clamp_min(LEAST_GAIN)
        spread = self.scale.log().mean().exp()
        self.scale = self.scale / spread
        sizes = sizes * torch.cat([batch.sizes[after][batch.real] for batch in self.batches]) * spread
        middle = sizes.median()
        apart = (sizes / middle).clamp_min(1e-3).log()
        sizes = middle * torch.exp(SIZE_SPREAD * torch.tanh(apart / SIZE_SPREAD))
        self.constant *= float(sizes.mean() / before)
        offset = torch.full_like(self.scale, self.constant)
        if after == len(self.norms) - 1:  # what follows is the last norm, which has no bias
            gain = self.norms[after].weight
            gain = torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp_min(LEAST_GAIN)
            offset = float(middle) * self.norms[after].bias / gain
        missing = sizes * self._units(after) + offset - self._known(self.stream) / self.scale
        return solve(features, missing, weights=(middle / sizes).square()) * self.scale[:, None]

    def _attention(self, own: DecoderLayer, other: Any, place: int, *, first: bool) -> None:
        theirs, attention, config = other.attention.self, own.self_attn, self.config
        sizes = self._sizes(place)
        normed = self._normed(own.input_layernorm)
        features, wanted = self._known(normed), self._targets(place)
        one = solve(features, torch.ones(len(features), 1))[0]
        query, key, value = (solve(features, linear(wanted)) for linear in (theirs.query, theirs.key, theirs.value))
        h, half = config.head_dim, config.head_dim // 2
        speeds = config.rope_theta ** -(torch.arange(half) / half)
        slow = [pair for pair in reversed(range(half)) if speeds[pair] * NEAR <= SLOW_TURN]
        fast = [pair for pair in range(half) if pair not in slow]
        places = [dim for pair in slow for dim in (pair, pair + half)]
        q, k, v = torch.zeros(3, config.heads, h, config.hidden_size)
        roots = root(features), root(features - features.mean(dim=0))
        for head in range(self.heads):
            rows = slice(head * h, (head + 1) * h)
            q[head, places], k[head, places] = largest_directions(query[rows], key[rows], roots, len(places))
            v[head] = value[rows]
        self._set(attention, q, k)
        for head, sizes_of in enumerate(
            _waves(*self._left_by_distance(attention, theirs, place, normed), speeds[fast])
        ):
            for pair, (cosine, sine) in zip(fast, sizes_of.tolist(), strict=True):
                # Turned, a pair's product is q0 k0 cos(wd) + q0 k1 sin(wd); d is the query's place less the key's.
                size = math.sqrt(math.hypot(cosine, sine)) or 1.0
                q[head, pair] = size * one
                k[head, pair], k[head, pair + half] = cosine / size * one, sine / size * one
        extra = range(self.heads, config.heads)
        if first:
            self._position_heads(extra, q, k, v, features, one, fast, slow[0])
        else:
            directions = torch.linalg.eigh(features.T @ features / len(features)).eigenvectors.T.flip(0)
            for number, head in enumerate(extra):
                v[head] = directions[number * h : (number + 1) * h]
        self._set(attention, q, k)
        attention.v_proj.weight.copy_(v.flatten(0, 1))
        contexts = [self._context(attention, x, batch.real) for x, batch in zip(normed, self.batches, strict=True)]
        attention.o_proj.weight.copy_(self._write(self._known(contexts), place, sizes))
        self.stream = [x + attention.o_proj(c) for x, c in zip(self.stream, contexts, strict=True)]

    def _position_heads(
        self,
        heads: Sequence[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        features: Tensor,
        one: Tensor,
        fast: Sequence[int],
        still: int,
    ) -> None:
        """Heads that tell a token's place: the first token's share, against the last's, falls with the distance to it.

        Args:
            heads: Their numbers.
            q: [H, h, D], written to; `k` and `v` as well.
            k: See `q`.
            v: See `q`.
            features: The normed stream, [N, D].
            one: What reads 1 off it, [D].
            fast: The rotary pairs that turn.
            still: One that does not.
        """
        ids = self._known([batch.ids[:, :, None] for batch in self.batches])
        front, back = (solve(features, (ids == number).float())[0] for number in (BOS_ID, EOS_ID))
        scale, half = math.sqrt(self.config.head_dim), self.config.head_dim // 2
        speeds = self.config.rope_theta ** -(torch.tensor(fast) / half)
        places = torch.arange(CURVE_PLACES).float()
        basis = torch.cat(
            [f(places[:, None] * speeds) for f in (torch.cos, torch.sin)] + [torch.ones_like(places)[:, None]], 1
        )
        near = 1 / (places + 3)  # texts have more first places than far ones
        first, last = (math.log(place) for place in CURVES)
        for number, head in enumerate(heads):
            centre = first + (last - first) * number / max(1, len(heads) - 1)
            curve = ((centre - (places + 1).log()) * CURVE_SLOPE).clamp(-CURVE_LIMIT, CURVE_LIMIT)
            *sizes, level = (fit(basis, curve, near) * scale).tolist()
            for pair, cosine, sine in zip(fast, sizes[: len(fast)], sizes[len(fast) :], strict=True):
                size = math.sqrt(math.hypot(cosine, sine)) or 1.0
                q[head, pair] = size * one
                k[head, pair], k[head, pair + half] = cosine / size * front, sine / size * front
            size = math.sqrt(END_SCORE * scale)
            q[head, still] = size * one
            k[head, still] = (size + level / size) * front + size * back
            v[head, 0] = front

    @staticmethod
    def _set(attention: Attention, q: Tensor, k: Tensor) -> None:
        attention.q_proj.weight.copy_(q.flatten(0, 1))
        attention.k_proj.weight.copy_(k.flatten(0, 1))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def _scores(self, attention: Attention, x: Tensor) -> Tensor:
        cos, sin = self.decoder.rotary(x.shape[1], x)
        q, k = (rotate(self._split(linear(x)), cos, sin) for linear in (attention.q_proj, attention.k_proj))
        return q @ k.transpose(-1, -2)

    def _context(self, attention: Attention, x: Tensor, real: Tensor) -> Tensor:
        cos, sin = self.decoder.rotary(x.shape[1], x)
        q, k = (rotate(self._split(linear(x)), cos, sin) for linear in (attention.q_proj, attention.k_proj))
        mask = real[:, None, None, :]
        found = F.scaled_dot_product_attention(q, k, self._split(attention.v_proj(x)), attn_mask=mask)
        return found.transpose(1, 2).flatten(-2)

    def _left_by_distance(
        self, attention: Attention, theirs: Any, place: int, normed: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What the teacher's scores have more than ours, mean [H, distances], and pairs of tokens, [distances]."""
        width = 2 * FARTHEST + 1
        total, seen = torch.zeros(self.heads, width), torch.zeros(width)
        norm = self.norms[place]
        for x, batch in list(zip(normed, self.batches, strict=True))[::FITTED_SHARE]:
            wanted = batch.states[place] * norm.weight + norm.bias
            q, k = (self._split(linear(wanted)) for linear in (theirs.query, theirs.key))
            inner = batch.real & (batch.ids != BOS_ID)
            both = (inner[:, :, None] & inner[:, None, :])[:, None]
            left = (q @ k.transpose(-1, -2) - self._scores(attention, x)[:, : self.heads]) * both
            # What a query adds to all its scores is no business of the softmax.
            left = (left - left.sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp_min(1)) * both
            places = torch.arange(x.shape[1])
            distance = places[:, None] - places[None, :]
            near = distance.abs() <= FARTHEST
            total.index_add_(1, distance[near] + FARTHEST, left.sum(dim=0)[:, near])
            seen.index_add_(0, distance[near] + FARTHEST, both.sum(dim=(0, 1))[near].float())
        return total / seen.clamp_min(1), seen

    def _feed_forward(self, own: DecoderLayer, other: Any, place: int) -> None:
        mlp, sizes, normed = own.mlp, self._sizes(place), self._normed(own.post_attention_layernorm)
        features = self._known(normed)
        inner = other.intermediate.dense(self._targets(place))
        # A neuron matters as much as it moves the stream.
        weight = F.gelu(inner).std(dim=0) * other.output.dense.weight.norm(dim=0)
        kept = weight.argsort(descending=True)[: self.config.intermediate_size].sort().values
        mlp.gate_proj.weight.zero_()
        mlp.up_proj.weight.zero_()
        mlp.gate_proj.weight[: len(kept)] = GELU_SLOPE * solve(features, inner[:, kept])
        mlp.up_proj.weight[: len(kept)] = solve(features, sizes / sizes.mean())
        inside = [F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
        mlp.down_proj.weight.copy_(self._write(self._known(inside), place, sizes))
        self.stream = [x + mlp.down_proj(y) for x, y in zip(self.stream, inside, strict=True)]


def _waves(left: Tensor, seen: Tensor, speeds: Tensor) -> Tensor:
    """Sizes of the cosines and sines [H, pairs, 2] that sum to given scores by distance, a constant apart."""
    angles = torch.arange(-FARTHEST, FARTHEST + 1)[:, None] * speeds
    basis = torch.cat((angles.cos(), angles.sin(), torch.ones(len(angles), 1)), dim=1)
    found = fit(basis, left.T, seen)[:-1]
    return found.T.reshape(-1, 2, len(speeds)).transpose(1, 2)
