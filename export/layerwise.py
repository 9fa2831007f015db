"""A model that computes block by block, with one block in memory at a time or all of them at once.

The blocks are the embeddings, each decoder layer, the final norm and the pooler. All batches pass through a block
before the next one starts, so that a model larger than memory is read once for all batches. Hooks, which measure ranges
and collect inputs of linear layers, see one block at a time. If a GPU's memory is smaller than the model, blocks are
copied there one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvembed_deploy.backends.base import Output
from nvembed_deploy.export.graph.weights import CheckpointWeights, WeightSource, one_thread, require_finite
from nvembed_deploy.model.float32 import full_float32
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import LatentAttentionModel
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.tokenization import TextEncoder, TokenBatch, TokenRow

EMBEDDINGS = "embedding_model.embed_tokens"
NORM = "embedding_model.norm"
POOLER = "latent_attention_model"
CPU = torch.device("cpu")
BlockHook = Callable[[str], AbstractContextManager[None]]
"""Takes a block's name and returns the context in which the block computes."""


def no_hook(_: str) -> AbstractContextManager[None]:
    """A `BlockHook` that does nothing."""
    return nullcontext()


class LayerwiseModel:
    """A model that computes block by block; see the module's docstring.

    Args:
        model: The model, in memory or on the meta device.
        weight_source: Where the weights of a model on the meta device are read from; None for a model in memory.
        device: Where blocks compute. A model in memory may be there as a whole, or on the CPU.
    """

    def __init__(
        self, model: NVEmbed, weight_source: WeightSource | None = None, *, device: torch.device = CPU
    ) -> None:
        self.model = model
        self.device = device
        self.weight_source = weight_source
        self.batch_index = 0
        """Index of the batch that is being computed."""
        self._edits: dict[str, list[Callable[[], None]]] = {}
        self._loaded = ""

    @classmethod
    def from_checkpoint(cls, weights: StoredWeights, *, fold: bool, device: torch.device = CPU) -> LayerwiseModel:
        """Creates a model whose weights stay in the checkpoint's files."""
        with torch.device("meta"):
            model = folded_form(NVEmbed(weights.config).requires_grad_(False).eval(), fold=fold)
        return cls(model, CheckpointWeights(weights, fold=fold), device=device)

    @property
    def streamed(self) -> bool:
        """True if only one block is in memory."""
        return self.weight_source is not None

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, in the order in which they compute."""
        layers = (f"embedding_model.layers.{index}" for index in range(len(self.model.embedding_model.layers)))
        return (EMBEDDINGS, *layers, NORM, POOLER)

    @property
    def parameter_count(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """Holds a block in memory, in FP32 and on the device, with its edits applied."""
        module = self.model.get_submodule(name)
        if self._loaded == name:
            yield module
            return
        stored_on = next((parameter.device for parameter in module.parameters()), self.device)
        if self.weight_source is not None:
            module.load_state_dict(self._read(name, module), strict=True, assign=True)
            module.requires_grad_(False)
        else:
            module.to(self.device)
        self._loaded = name
        try:
            if self.weight_source is not None:
                for edit in self._edits.get(name, ()):
                    edit()
            yield module
        finally:
            module.to(stored_on)
            self._loaded = ""

    def _read(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Returns the weights of a streamed block on the device, after a look at their values."""
        assert self.weight_source is not None
        tensors = {key: self.weight_source.read(f"{name}.{key}").float() for key, _ in module.named_parameters()}
        with one_thread():
            for key, tensor in tensors.items():
                require_finite(f"{name}.{key}", tensor)
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def edit(self, block_name: str, edit: Callable[[], None]) -> None:
        """Changes a block's weights in place, now and each time that the block is loaded again."""
        if self.weight_source is None:
            edit()
            return
        self._edits.setdefault(block_name, []).append(edit)
        if self._loaded == block_name:
            edit()

    @full_float32()
    @torch.no_grad()
    def forward(self, batches: Sequence[TokenBatch], *, hook: BlockHook = no_hook, description: str = "") -> Tensor:
        """Embeds batches.

        Args:
            batches: Right-padded rows.
            hook: Entered around the computation of each block, while the block is in memory.
            description: Text of the progress bar, which is shown for streamed models.

        Returns:
            float32 [N, D] on the CPU, rows of unit length, batch after batch.
        """
        inputs = self._tensors(batches)
        hidden: list[Tensor] = [ids for ids, _, _ in inputs]
        bar = tqdm(
            self.block_names, desc=description, unit="block", disable=None if self.streamed else True, leave=False
        )
        for name in bar:
            with self.block(name) as module, hook(name):
                for self.batch_index, (_, attention_mask, _) in enumerate(inputs):
                    hidden[self.batch_index] = self._step(name, module, hidden[self.batch_index], attention_mask)
        return self._pooled(hidden, inputs)

    @full_float32()
    @torch.no_grad()
    def variants(
        self,
        batches: Sequence[TokenBatch],
        changes: Mapping[str, Callable[[], AbstractContextManager[None]]],
        description: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeds batches as they are, and once more for each change of a block.

        The blocks in front of a changed one are computed once for all variants.

        Args:
            batches: Right-padded rows.
            changes: Context in which a changed block computes, by the name of a module in it.
            description: Text of the progress bar.

        Returns:
            float32 [N, D] of the unchanged model, and of the model with each change.
        """
        inputs = self._tensors(batches)
        unchanged: list[Tensor] = [ids for ids, _, _ in inputs]
        changed: dict[str, list[Tensor]] = {}
        for name in tqdm(self.block_names, desc=description, unit="block", disable=None, leave=False):
            with self.block(name) as module:

                def run_block(
                    hidden_by_batch: list[Tensor], name: str = name, module: nn.Module = module
                ) -> list[Tensor]:
                    return [
                        self._step(name, module, x, attention_mask)
                        for x, (_, attention_mask, _) in zip(hidden_by_batch, inputs, strict=True)
                    ]

                changed = {key: run_block(hidden) for key, hidden in changed.items()}
                for key, change in changes.items():
                    if block_of(key) == name:
                        with change():
                            changed[key] = run_block(unchanged)
                unchanged = run_block(unchanged)
        return self._pooled(unchanged, inputs), {key: self._pooled(hidden, inputs) for key, hidden in changed.items()}

    def _pooled(self, hidden: Sequence[Tensor], inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
        return torch.cat(
            [self.model.pool(x, pool_mask)[0].cpu() for x, (_, _, pool_mask) in zip(hidden, inputs, strict=True)]
        )

    def _tensors(self, batches: Sequence[TokenBatch]) -> list[tuple[Tensor, ...]]:
        return [tuple(torch.from_numpy(array).to(self.device) for array in batch) for batch in batches]

    def _step(self, name: str, module: nn.Module, x: Tensor, attention_mask: Tensor) -> Tensor:
        if name in (EMBEDDINGS, NORM, POOLER):
            out: Tensor = module(x)
            return out
        decoder = self.model.embedding_model
        cos, sin = decoder.rotary(x.shape[1], x)
        out = module(x, cos, sin, decoder.visible(attention_mask, int(name.rpartition(".")[2])))
        return out

    def embed(self, text: TextEncoder, rows: Sequence[TokenRow], *, hook: BlockHook = no_hook) -> Tensor:
        """Returns float32 [N, D], each row computed in a batch of its own."""
        return self.forward([text.pad([row]) for row in rows], hook=hook, description="embedding, layer by layer")


class LayerwiseBackend:
    """A reference that computes block by block, all batches at once: for a GPU that does not hold the whole model.

    Args:
        layerwise: The model, its pooler not folded.
    """

    profile = None
    in_flight = 1

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self._layerwise = layerwise
        self.name = f"PyTorch {torch.__version__} fp32 ({str(layerwise.device).upper()}, block by block)"

    def run_all(self, batches: Sequence[TokenBatch]) -> list[Output]:
        """Embeds batches; see `Backend.run`."""
        embeddings = self._layerwise.forward(batches, description="embedding, layer by layer")
        sizes = [len(batch.input_ids) for batch in batches]
        return [Output(part.numpy(), part.norm(dim=1).numpy()) for part in torch.split(embeddings, sizes)]

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        return self.run_all([batch])[0]

    run_concurrent = run


def block_of(name: str) -> str:
    """Returns the name of the block that a parameter or a module belongs to."""
    components = name.split(".")
    if components[0] == POOLER:
        return POOLER
    return ".".join(components[: 3 if components[1] == "layers" else 2])


def folded_form(model: NVEmbed, *, fold: bool) -> NVEmbed:
    """Replaces the model's latent attention by its folded form, in place, if it has one and `fold` is True."""
    if fold and isinstance(model.latent_attention_model, LatentAttentionModel):
        model.latent_attention_model = FoldedLatentAttention(model.latent_attention_model)
    return model
