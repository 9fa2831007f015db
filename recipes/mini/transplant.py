"""A small decoder whose layers start from a teacher's: a BERT is converted into a Mistral by least squares.

The two differ in every part: norms after and before a block, with and without biases, learned and rotary positions,
GELU and SwiGLU, different tokens. So nothing is copied. The weights of each block are solved for, one block after the
other, from the teacher's states on real text and the decoder's states so far; later blocks correct earlier ones.

- Norms: the teacher's state after a block is `gain * n + bias`, with n of unit size. The decoder's residual stream
  holds `size * scale * n`: a gain that the teacher multiplies into its residual is divided out of everything written
  later instead (`scale`, one number per channel, known beforehand), and the size may differ from token to token, since
  the next norm removes it. The few tokens whose size would grow without bound are kept close to the others'.
- Biases: a component of the stream along `scale` itself is constant; n has no mean, so nothing else lies there.
- Queries and keys: a head's bilinear form is reduced to its largest directions, which use the rotary pairs that hardly
  rotate within a text. The pairs that rotate fast hold the remaining scores of the head as a function of distance.
- Positions: heads of the first layer that have no counterpart in the teacher weigh the first token against the last by
  a curve of the position. In other layers such heads take the mean over the text.
- GELU(x) is about silu(1.702 x) / 1.702, a SwiGLU whose second factor is the token's size. The most important of the
  teacher's neurons are used, and their output weights are solved for again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.model.config import LatentAttention, ModelConfig
from nvembed_deploy.model.config_json import read_architecture
from nvembed_deploy.model.decoder import Attention, Decoder, DecoderLayer, RMSNorm, rotate
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training.student import contract, nvembed_config
from recipes.mini.bert_states import Batch, bert_of, calibration, norms_of, token_rows, unit
from recipes.mini.least_squares import fit, largest_directions, root, solve
from recipes.mini.teacher import Teacher

BATCH_TEXTS = 32
CALIBRATION_TOKENS = 200_000
"""Maximum number of tokens that weights are solved for on: the teacher's states of them are in memory."""
MIN_TOKENS_PER_FEATURE = 10
"""Minimum number of tokens for each input of a matrix; with fewer, it would overfit these texts."""
CONSTANT = 0.2
"""Size of the constant component beside n, whose root mean square is 1."""
SLOW_RADIANS, SLOW_TOKENS = 0.5, 128
"""A rotary pair holds a head's content scores if it rotates by at most so many radians within so many tokens."""
AVERAGED_POSITIONS = 40
"""Number of first positions of a text whose mean is added to a token's row."""
MAX_DISTANCE = 40
"""Distance in tokens up to which a head's scores are fitted."""
DISTANCE_BATCH_STEP = 4
"""The fit by distance uses every fourth batch of the calibration text."""
GELU_SLOPE = 1.702
SIZE_SPREAD = 0.2
"""Maximum difference of a token's size from the median, as a logarithm."""
MIN_GAIN = 0.05
CURVE_CENTRES = (2.0, 150.0)
"""Positions at which the first and the last position head weigh both ends equally."""
CURVE_SLOPE, CURVE_LIMIT, CURVE_POSITIONS = 1.5, 6.0, 384
BOS_ID, EOS_ID = 1, 2
END_SCORE = 40.0
"""Score of both ends above all other tokens in a position head."""


@dataclass(frozen=True, kw_only=True)
class Transplant:
    """Weights of a decoder that computes nearly the same as its teacher."""

    weights: dict[str, Tensor]
    """State of a `Decoder`, float32."""
    agreement: float
    """Mean cosine of the decoder's mean-pooled states to the teacher's, which runs on the same tokens of the
    calibration texts."""


class _RotaryPairs(NamedTuple):
    """Rotary pairs of a head by their speed."""

    slow: list[int]
    """Pairs that hardly rotate within a text."""
    fast: list[int]
    """All other pairs."""
    fast_speeds: Tensor
    """Radians per token of the fast pairs."""


class _HeadWeights(NamedTuple):
    """Projections of an attention block by head, [H, h, D] each."""

    q: Tensor
    k: Tensor
    v: Tensor

    def add_wave(
        self, head: int, pair: int, amplitudes: tuple[float, float], *, query_reader: Tensor, key_reader: Tensor
    ) -> None:
        """Makes a rotary pair add a wave of the distance to a head's scores.

        After rotation a pair contributes q0 k0 cos(wd) + q0 k1 sin(wd), where d is the query's position minus the
        key's.

        Args:
            head: Index of the head.
            pair: Index of the rotary pair.
            amplitudes: Amplitudes of the cosine and of the sine.
            query_reader: [D], reads the query's factor off the normed stream.
            key_reader: [D], reads the key's factor off the normed stream.
        """
        cosine, sine = amplitudes
        size = math.sqrt(math.hypot(cosine, sine)) or 1.0
        half = self.k.shape[1] // 2
        self.q[head, pair] = size * query_reader
        self.k[head, pair], self.k[head, pair + half] = cosine / size * key_reader, sine / size * key_reader


def transplant(
    teacher: Teacher,
    texts: Sequence[str],
    *,
    config: dict[str, Any],
    tokenizer_json: str,
    max_length: int,
) -> Transplant:
    """Makes a bidirectional decoder that computes nearly the same as a teacher.

    Args:
        teacher: A BERT.
        texts: Real text to solve on; the first texts up to `CALIBRATION_TOKENS` are used.
        config: Fields of `MistralConfig`; hidden size, layers and head dimension must be the teacher's, with at least
            as many heads.
        tokenizer_json: Content of the decoder's `tokenizer.json`.
        max_length: Maximum number of tokens of a text.

    Raises:
        ConfigError: The teacher is not a BERT or has other sizes, or the texts are too few.
    """
    architecture = read_architecture(nvembed_config(config, LatentAttention(head_dim=config["hidden_size"])))
    encoder = TextEncoder(tokenizer_json.encode(), contract(architecture))
    tokenized = encoder.tokenize(texts, max_length=max_length)
    totals = itertools.accumulate(map(len, tokenized))
    rows = sorted((row for row, total in zip(tokenized, totals, strict=True) if total <= CALIBRATION_TOKENS), key=len)
    row_batches = [rows[start : start + BATCH_TEXTS] for start in range(0, len(rows), BATCH_TEXTS)]
    bert, embeddings = bert_of(teacher), token_rows(Tokenizer.from_str(tokenizer_json), teacher)
    batches = list(calibration(bert, embeddings, (encoder.pad(row_batch) for row_batch in row_batches)))
    solver = _Solver(bert, architecture, embeddings, batches)
    return Transplant(weights=solver.run(), agreement=solver.agreement())


class _Solver:
    """Solves for a decoder's weights, layer by layer.

    Args:
        bert: A BERT of the decoder's hidden size and head dimension.
        config: The decoder's sizes.
        embeddings: Embedding of each of the decoder's tokens in the teacher; see `token_rows`.
        batches: Calibration text; see `calibration`.
    """

    def __init__(self, bert: Any, config: ModelConfig, embeddings: Tensor, batches: Sequence[Batch]) -> None:
        self.bert, self.config, self.batches = bert, config, batches
        hidden_size, heads = bert.config.hidden_size, bert.config.num_attention_heads
        sizes = (config.hidden_size, config.layers, config.kv_heads, config.head_dim)
        teacher_sizes = (hidden_size, bert.config.num_hidden_layers, config.heads, hidden_size // heads)
        if sizes != teacher_sizes or config.heads < heads:
            raise ConfigError(
                f"hidden size, layers, key/value heads and head dimension are {sizes}; for this teacher they must be "
                f"{teacher_sizes}, with at least {heads} heads"
            )
        tokens = sum(int(batch.real.sum()) for batch in batches)
        min_tokens = MIN_TOKENS_PER_FEATURE * max(hidden_size, config.intermediate_size)
        if tokens < min_tokens:
            raise ConfigError(
                f"the texts have {tokens} tokens, but layers of this size need {min_tokens}; pass more text"
            )
        self.heads = heads
        self.norms = norms_of(self.bert)
        self.decoder = Decoder(config).requires_grad_(False)
        self.decoder.embed_tokens.weight.copy_(self._table(embeddings) + CONSTANT)
        self.stream = [self.decoder.embed_tokens(batch.ids) for batch in batches]
        self.scale = torch.ones(hidden_size)
        self.constant = CONSTANT

    @torch.no_grad()
    def _table(self, embeddings: Tensor) -> Tensor:
        """Returns the output of the teacher's first norm for each token at an average position, `<s>` at its own."""
        bert_embeddings = self.bert.embeddings
        positions = bert_embeddings.position_embeddings.weight
        average = positions[1 : AVERAGED_POSITIONS + 1].mean(dim=0)
        table = embeddings + bert_embeddings.token_type_embeddings.weight[0] + average
        table[BOS_ID] += positions[0] - average
        return unit(table)[0]

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """Solves for everything and returns the decoder's weights."""
        layers = list(zip(self.decoder.layers, self.bert.encoder.layer, strict=True))
        for index, (layer, bert_layer) in enumerate(tqdm(layers, desc="layers from the teacher's", disable=None)):
            self._attention(layer, bert_layer, 2 * index, is_first=index == 0)
            self._feed_forward(layer, bert_layer, 2 * index + 1)
        normed, targets = self._real_rows(self._normed(self.decoder.norm)), self._targets(-1)
        self.decoder.norm.weight.mul_((normed * targets).sum(dim=0) / normed.square().sum(dim=0))
        return self.decoder.state_dict()

    @torch.no_grad()
    def agreement(self) -> float:
        """Returns the mean cosine of the mean-pooled states, student to teacher, on the calibration text."""
        cosines = []
        for batch, stream in zip(self.batches, self.stream, strict=True):
            hidden, is_real = self.decoder.norm(stream), batch.real[:, :, None]
            targets = batch.states[-1] * self.norms[-1].weight + self.norms[-1].bias
            cosines.append(F.cosine_similarity((hidden * is_real).sum(1), (targets * is_real).sum(1), dim=-1))
        return float(torch.cat(cosines).mean())

    def _normed(self, norm: RMSNorm) -> list[Tensor]:
        """Returns the input of a block, after setting its norm's weights so that it is n again, of about its size."""
        norm.weight.copy_(1 / self.scale)
        size = self._real_rows([norm(x) for x in self.stream]).square().mean().sqrt()
        norm.weight.div_(size)
        return [norm(x) for x in self.stream]

    def _real_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenates the real tokens of tensors [R, T, D], one for each batch, to [N, D]."""
        return torch.cat([tensor[batch.real] for tensor, batch in zip(tensors, self.batches, strict=True)])

    def _units(self, norm_index: int) -> Tensor:
        """Returns the teacher's n at a norm, [N, D]."""
        return torch.cat([batch.states[norm_index][batch.real] for batch in self.batches])

    def _targets(self, norm_index: int) -> Tensor:
        """Returns the teacher's state after a norm, [N, D]."""
        return self._units(norm_index) * self.norms[norm_index].weight + self.norms[norm_index].bias

    def _sizes(self, norm_index: int) -> Tensor:
        """Returns the size of the teacher's n in the stream, [N, 1]."""
        units = self._units(norm_index)
        stream = self._real_rows(self.stream) / self.scale
        stream = stream - stream.mean(dim=-1, keepdim=True)
        return (stream * units).sum(dim=-1, keepdim=True) / units.square().sum(dim=-1, keepdim=True)

    def _write(self, features: Tensor, norm_index: int, sizes: Tensor) -> Tensor:
        """Returns weights [D, F] with which features move the stream from one of the teacher's states to the next.

        Args:
            features: float32 [N, F], outputs inside the block.
            norm_index: Index of the norm of the state before the block.
            sizes: [N, 1], size of that state in the stream.
        """
        next_index = norm_index + 1
        mean_size = sizes.mean()
        self.scale = self.scale / self.norms[norm_index].weight.abs().clamp_min(MIN_GAIN)
        spread = self.scale.log().mean().exp()
        self.scale = self.scale / spread
        next_sizes = sizes * torch.cat([batch.sizes[next_index][batch.real] for batch in self.batches]) * spread
        median = next_sizes.median()
        log_ratios = (next_sizes / median).clamp_min(1e-3).log()
        next_sizes = median * torch.exp(SIZE_SPREAD * torch.tanh(log_ratios / SIZE_SPREAD))
        self.constant *= float(next_sizes.mean() / mean_size)
        offset = torch.full_like(self.scale, self.constant)
        if next_index == len(self.norms) - 1:  # the decoder's last norm follows, which has no bias
            gain = self.norms[next_index].weight
            gain = torch.where(gain < 0, -1.0, 1.0) * gain.abs().clamp_min(MIN_GAIN)
            offset = float(median) * self.norms[next_index].bias / gain
        residuals = next_sizes * self._units(next_index) + offset - self._real_rows(self.stream) / self.scale
        return solve(features, residuals, weights=(median / next_sizes).square()) * self.scale[:, None]

    def _attention(self, layer: DecoderLayer, bert_layer: Any, norm_index: int, *, is_first: bool) -> None:
        """Solves for the attention of a layer and applies it to the stream."""
        bert_attention, attention, config = bert_layer.attention.self, layer.self_attn, self.config
        sizes = self._sizes(norm_index)
        normed = self._normed(layer.input_layernorm)
        features = self._real_rows(normed)
        one_reader = solve(features, torch.ones(len(features), 1))[0]
        pairs = _rotary_pairs(config)
        heads = _HeadWeights(*torch.zeros(3, config.heads, config.head_dim, config.hidden_size))
        self._content_heads(heads, bert_attention, features, self._targets(norm_index), pairs)
        self._set_queries_and_keys(attention, heads)
        waves = _waves(*self._residual_scores(attention, bert_attention, norm_index, normed), pairs.fast_speeds)
        for head, head_waves in enumerate(waves):
            for pair, (cosine, sine) in zip(pairs.fast, head_waves.tolist(), strict=True):
                heads.add_wave(head, pair, (cosine, sine), query_reader=one_reader, key_reader=one_reader)
        if is_first:
            self._position_heads(heads, features, one_reader, pairs)
        else:
            self._mean_heads(heads, features)
        self._set_queries_and_keys(attention, heads)
        attention.v_proj.weight.copy_(heads.v.flatten(0, 1))
        contexts = [self._context(attention, x, batch.real) for x, batch in zip(normed, self.batches, strict=True)]
        attention.o_proj.weight.copy_(self._write(self._real_rows(contexts), norm_index, sizes))
        self.stream = [x + attention.o_proj(c) for x, c in zip(self.stream, contexts, strict=True)]

    def _content_heads(
        self, heads: _HeadWeights, bert_attention: Any, features: Tensor, targets: Tensor, pairs: _RotaryPairs
    ) -> None:
        """Solves for the teacher's heads; scores use the slow rotary pairs alone.

        Args:
            heads: Written to.
            bert_attention: The teacher's attention block.
            features: The normed stream, [N, D].
            targets: The input of the teacher's block, [N, D].
            pairs: Rotary pairs of a head.
        """
        query, key, value = (
            solve(features, linear(targets))
            for linear in (bert_attention.query, bert_attention.key, bert_attention.value)
        )
        h, half = self.config.head_dim, self.config.head_dim // 2
        slow_dims = [dim for pair in pairs.slow for dim in (pair, pair + half)]
        roots = root(features), root(features - features.mean(dim=0))
        for head in range(self.heads):
            rows = slice(head * h, (head + 1) * h)
            heads.q[head, slow_dims], heads.k[head, slow_dims] = largest_directions(
                query[rows], key[rows], roots, len(slow_dims)
            )
            heads.v[head] = value[rows]

    def _mean_heads(self, heads: _HeadWeights, features: Tensor) -> None:
        """Makes the heads without a counterpart in the teacher take the mean of the largest directions.

        Args:
            heads: Written to.
            features: The normed stream, [N, D].
        """
        h = self.config.head_dim
        directions = torch.linalg.eigh(features.T @ features / len(features)).eigenvectors.T.flip(0)
        for index, head in enumerate(range(self.heads, self.config.heads)):
            heads.v[head] = directions[index * h : (index + 1) * h]

    def _position_heads(self, heads: _HeadWeights, features: Tensor, one_reader: Tensor, pairs: _RotaryPairs) -> None:
        """Makes the heads without a counterpart in the teacher encode a token's position.

        The weight of the first token, against the last, falls with the distance to it.

        Args:
            heads: Written to.
            features: The normed stream, [N, D].
            one_reader: [D], reads the constant 1 off the normed stream.
            pairs: Rotary pairs of a head.
        """
        ids = self._real_rows([batch.ids[:, :, None] for batch in self.batches])
        bos_reader, eos_reader = (solve(features, (ids == token_id).float())[0] for token_id in (BOS_ID, EOS_ID))
        scale, half = math.sqrt(self.config.head_dim), self.config.head_dim // 2
        speeds = self.config.rope_theta ** -(torch.tensor(pairs.fast) / half)
        positions = torch.arange(CURVE_POSITIONS).float()
        basis = torch.cat(
            [f(positions[:, None] * speeds) for f in (torch.cos, torch.sin)] + [torch.ones_like(positions)[:, None]], 1
        )
        position_weights = 1 / (positions + 3)  # early positions occur in more texts than late ones
        log_start, log_end = (math.log(position) for position in CURVE_CENTRES)
        position_heads = range(self.heads, self.config.heads)
        for index, head in enumerate(position_heads):
            log_centre = log_start + (log_end - log_start) * index / max(1, len(position_heads) - 1)
            curve = ((log_centre - (positions + 1).log()) * CURVE_SLOPE).clamp(-CURVE_LIMIT, CURVE_LIMIT)
            *amplitudes, level = (fit(basis, curve, position_weights) * scale).tolist()
            cosines, sines = amplitudes[: len(pairs.fast)], amplitudes[len(pairs.fast) :]
            for pair, cosine, sine in zip(pairs.fast, cosines, sines, strict=True):
                heads.add_wave(head, pair, (cosine, sine), query_reader=one_reader, key_reader=bos_reader)
            size = math.sqrt(END_SCORE * scale)
            slowest = pairs.slow[0]
            heads.q[head, slowest] = size * one_reader
            heads.k[head, slowest] = (size + level / size) * bos_reader + size * eos_reader
            heads.v[head, 0] = bos_reader

    @staticmethod
    def _set_queries_and_keys(attention: Attention, heads: _HeadWeights) -> None:
        attention.q_proj.weight.copy_(heads.q.flatten(0, 1))
        attention.k_proj.weight.copy_(heads.k.flatten(0, 1))

    def _split(self, x: Tensor) -> Tensor:
        """Splits [R, T, H h] into heads [R, H, T, h]."""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def _rotated(self, attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys [R, H, T, h] with rotary position embeddings."""
        cos, sin = self.decoder.rotary(x.shape[1], x)
        q, k = (rotate(self._split(linear(x)), cos, sin) for linear in (attention.q_proj, attention.k_proj))
        return q, k

    def _scores(self, attention: Attention, x: Tensor) -> Tensor:
        q, k = self._rotated(attention, x)
        return q @ k.transpose(-1, -2)

    def _context(self, attention: Attention, x: Tensor, real: Tensor) -> Tensor:
        """Returns the attention's output before the output projection, [R, T, H h]."""
        q, k = self._rotated(attention, x)
        mask = real[:, None, None, :]
        context = F.scaled_dot_product_attention(q, k, self._split(attention.v_proj(x)), attn_mask=mask)
        return context.transpose(1, 2).flatten(-2)

    def _residual_scores(
        self, attention: Attention, bert_attention: Any, norm_index: int, normed: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns the teacher's scores minus the decoder's, [H, distances], and counts of token pairs, [distances]."""
        distances = 2 * MAX_DISTANCE + 1
        totals, pair_counts = torch.zeros(self.heads, distances), torch.zeros(distances)
        norm = self.norms[norm_index]
        for x, batch in list(zip(normed, self.batches, strict=True))[::DISTANCE_BATCH_STEP]:
            targets = batch.states[norm_index] * norm.weight + norm.bias
            q, k = (self._split(linear(targets)) for linear in (bert_attention.query, bert_attention.key))
            inner = batch.real & (batch.ids != BOS_ID)
            both = (inner[:, :, None] & inner[:, None, :])[:, None]
            residual = (q @ k.transpose(-1, -2) - self._scores(attention, x)[:, : self.heads]) * both
            # The softmax is invariant to what a query adds to all its scores.
            residual = (residual - residual.sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp_min(1)) * both
            positions = torch.arange(x.shape[1])
            distance = positions[:, None] - positions[None, :]
            is_fitted = distance.abs() <= MAX_DISTANCE
            columns = distance[is_fitted] + MAX_DISTANCE
            totals.index_add_(1, columns, residual.sum(dim=0)[:, is_fitted])
            pair_counts.index_add_(0, columns, both.sum(dim=(0, 1))[is_fitted].float())
        return totals / pair_counts.clamp_min(1), pair_counts

    def _feed_forward(self, layer: DecoderLayer, bert_layer: Any, norm_index: int) -> None:
        """Solves for the feed-forward block of a layer and applies it to the stream."""
        mlp, sizes, normed = layer.mlp, self._sizes(norm_index), self._normed(layer.post_attention_layernorm)
        features = self._real_rows(normed)
        inputs = bert_layer.intermediate.dense(self._targets(norm_index))
        # A neuron is as important as the change that it makes to the stream.
        importance = F.gelu(inputs).std(dim=0) * bert_layer.output.dense.weight.norm(dim=0)
        neurons = importance.argsort(descending=True)[: self.config.intermediate_size].sort().values
        mlp.gate_proj.weight.zero_()
        mlp.up_proj.weight.zero_()
        mlp.gate_proj.weight[: len(neurons)] = GELU_SLOPE * solve(features, inputs[:, neurons])
        mlp.up_proj.weight[: len(neurons)] = solve(features, sizes / sizes.mean())
        activations = [F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
        mlp.down_proj.weight.copy_(self._write(self._real_rows(activations), norm_index, sizes))
        self.stream = [x + mlp.down_proj(y) for x, y in zip(self.stream, activations, strict=True)]


def _rotary_pairs(config: ModelConfig) -> _RotaryPairs:
    """Sorts the rotary pairs of a head by their speed, the slowest first."""
    half = config.head_dim // 2
    speeds = config.rope_theta ** -(torch.arange(half) / half)
    slow = [pair for pair in reversed(range(half)) if speeds[pair] * SLOW_TOKENS <= SLOW_RADIANS]
    fast = [pair for pair in range(half) if pair not in slow]
    return _RotaryPairs(slow, fast, speeds[fast])


def _waves(scores: Tensor, pair_counts: Tensor, speeds: Tensor) -> Tensor:
    """Fits cosine and sine waves to scores by distance, up to a constant.

    Args:
        scores: [H, distances].
        pair_counts: [distances], weights of the fit.
        speeds: Radians per token of each rotary pair.

    Returns:
        Amplitudes [H, pairs, 2] of the cosines and sines.
    """
    angles = torch.arange(-MAX_DISTANCE, MAX_DISTANCE + 1)[:, None] * speeds
    basis = torch.cat((angles.cos(), angles.sin(), torch.ones(len(angles), 1)), dim=1)
    amplitudes = fit(basis, scores.T, pair_counts)[:-1]
    return amplitudes.T.reshape(-1, 2, len(speeds)).transpose(1, 2)
