"""A model that computes part by part: each part in memory while it is at work, or all of them at once.

The parts are the embeddings, each decoder layer, the final norm and the pooler. Every batch passes a part before the
next part begins, so a model larger than memory is read once for all batches, and what is looked at while it runs
(ranges, inputs of linear layers) is of one part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvembed_deploy.export.graph.weights import State, StoredState
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import LatentAttentionModel
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.tokenization import TextEncoder, TokenBatch, TokenRow

EMBEDDINGS = "embedding_model.embed_tokens"
NORM = "embedding_model.norm"
POOLER = "latent_attention_model"
Watch = Callable[[str], AbstractContextManager[None]]
"""Given a part's name, what stands around its work."""


def unwatched(_: str) -> AbstractContextManager[None]:
    """Nothing around a part's work."""
    return nullcontext()


class Parts:
    """See the module's text.

    Args:
        model: In memory, or on the meta device.
        state: Where its weights come from, if it is on the meta device.
    """

    def __init__(self, model: NVEmbed, state: State | None = None) -> None:
        self.model = model
        self.state = state
        self.batch = 0
        """Number of the batch that is being computed."""
        self._edits: dict[str, list[Callable[[], None]]] = {}
        self._loaded = ""

    @classmethod
    def of_checkpoint(cls, weights: StoredWeights, *, fold: bool) -> Parts:
        """A model whose weights stay in the checkpoint's files."""
        with torch.device("meta"):
            model = folded_form(NVEmbed(weights.config).requires_grad_(False).eval(), fold=fold)
        return cls(model, StoredState(weights, fold=fold))

    @property
    def streamed(self) -> bool:
        """True where only one part is in memory."""
        return self.state is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The parts, in the order of the data."""
        layers = (f"embedding_model.layers.{index}" for index in range(len(self.model.embedding_model.layers)))
        return (EMBEDDINGS, *layers, NORM, POOLER)

    @contextmanager
    def part(self, name: str) -> Iterator[nn.Module]:
        """Holds a part in memory, in FP32, as `edit` has changed it."""
        module = self.model.get_submodule(name)
        if self.state is None or self._loaded == name:
            yield module
            return
        loaded = {own: self.state.read(f"{name}.{own}").float() for own, _ in module.named_parameters()}
        module.load_state_dict(loaded, strict=True, assign=True)
        module.requires_grad_(False)
        del loaded
        self._loaded = name
        try:
            for change in self._edits.get(name, ()):
                change()
            yield module
        finally:
            module.to("meta")
            self._loaded = ""

    def edit(self, part: str, change: Callable[[], None]) -> None:
        """Changes a part's weights in place, now and whenever it comes into memory again."""
        if self.state is None:
            change()
            return
        self._edits.setdefault(part, []).append(change)
        if self._loaded == part:
            change()

    @torch.no_grad()
    def forward(self, batches: Sequence[TokenBatch], *, watch: Watch = unwatched, what: str = "") -> Tensor:
        """Embeds batches.

        Args:
            batches: Right-padded rows.
            watch: Stands around the work of each part, while the part is in memory.
            what: Said by the progress bar, which there is for streamed models.

        Returns:
            float32 [N, D], rows of unit length, batch after batch.
        """
        inputs = _tensors(batches)
        states: list[Tensor] = [ids for ids, _, _ in inputs]
        bar = tqdm(self.names, desc=what, unit="part", disable=None if self.streamed else True, leave=False)
        for name in bar:
            with self.part(name) as module, watch(name):
                for self.batch, (_, attended, _) in enumerate(inputs):
                    states[self.batch] = self._step(name, module, states[self.batch], attended)
        return self._pooled(states, inputs)

    @torch.no_grad()
    def variants(
        self,
        batches: Sequence[TokenBatch],
        changes: Mapping[str, Callable[[], AbstractContextManager[None]]],
        what: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeds batches, and again for each change of a part: what comes before that part is computed once for all.

        Args:
            batches: Right-padded rows.
            changes: By the name of a module in the changed part: what stands around the part's work then.
            what: Said by the progress bar.

        Returns:
            float32 [N, D] without a change, and with each.
        """
        inputs = _tensors(batches)
        plain: list[Tensor] = [ids for ids, _, _ in inputs]
        changed: dict[str, list[Tensor]] = {}
        for name in tqdm(self.names, desc=what, unit="part", disable=None, leave=False):
            with self.part(name) as module:

                def forward(states: list[Tensor], name: str = name, module: nn.Module = module) -> list[Tensor]:
                    return [
                        self._step(name, module, state, item[1]) for state, item in zip(states, inputs, strict=True)
                    ]

                changed = {key: forward(states) for key, states in changed.items()}
                for key, change in changes.items():
                    if part_of(key) == name:
                        with change():
                            changed[key] = forward(plain)
                plain = forward(plain)
        return self._pooled(plain, inputs), {key: self._pooled(states, inputs) for key, states in changed.items()}

    def _pooled(self, states: Sequence[Tensor], inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
        return torch.cat([self.model.pool(state, item[2])[0] for state, item in zip(states, inputs, strict=True)])

    def _step(self, name: str, module: nn.Module, state: Tensor, attended: Tensor) -> Tensor:
        if name in (EMBEDDINGS, NORM, POOLER):
            found: Tensor = module(state)
            return found
        decoder = self.model.embedding_model
        cos, sin = decoder.rotary(state.shape[1], state)
        found = module(state, cos, sin, decoder.visible(attended))
        return found

    def embed(self, text: TextEncoder, rows: Sequence[TokenRow], *, watch: Watch = unwatched) -> Tensor:
        """float32 [N, D] of rows, each alone."""
        return self.forward([text.pad([row]) for row in rows], watch=watch, what="embedding, layer by layer")


def _tensors(batches: Sequence[TokenBatch]) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.from_numpy(item) for item in batch) for batch in batches]


def part_of(name: str) -> str:
    """The part that a parameter or a module belongs to."""
    pieces = name.split(".")
    if pieces[0] == POOLER:
        return POOLER
    return ".".join(pieces[: 3 if pieces[1] == "layers" else 2])


def folded_form(model: NVEmbed, *, fold: bool) -> NVEmbed:
    """Puts the folded pooler in place of the model's, if it has one and `fold` says so; in place."""
    if fold and isinstance(model.latent_attention_model, LatentAttentionModel):
        model.latent_attention_model = FoldedLatentAttention(model.latent_attention_model)
    return model
