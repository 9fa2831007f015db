"""Neurons that cancel each other, on the tiny checkpoint with such a pair added."""

import copy
import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from nvembed_deploy.model.config_json import read_checkpoint_architecture  # noqa: E402
from nvembed_deploy.model.text_contract import text_contract  # noqa: E402
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from recipes.mini.cancelling import settle_neurons  # noqa: E402

MIN_COSINE = 0.999
"""Lowest cosine of a text before and after: the penalty is 1e-3 of each neuron's power."""
WORDS = ("water", "question", "over", "passage", "in", "and", "a", "phrase", "of", "retrieved", "words", "ice", "7")


@pytest.fixture(scope="module")
def encoder(checkpoint):
    contract = text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


@pytest.fixture(scope="module")
def cancelling(checkpoint):
    """Returns a model with two neurons in each layer that nearly cancel: each writes 300 times their sum."""
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        for layer in model.embedding_model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[1] = linear.weight[0] * 1.001
            large = 300 * layer.mlp.down_proj.weight[:, 0]
            layer.mlp.down_proj.weight[:, 0] += large
            layer.mlp.down_proj.weight[:, 1] -= large
    return model


def embed(model, encoder, texts):
    batch = encoder.pad(encoder.tokenize(texts, max_length=64))
    with torch.no_grad():
        return model(*(torch.from_numpy(array) for array in batch))[0].float()


def test_cancelling_neurons_are_refitted_and_bf16_loses_less(cancelling, encoder):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(400)]
    model = copy.deepcopy(cancelling)
    before = embed(model, encoder, texts[:50])
    largest = [layer.mlp.down_proj.weight.abs().max() for layer in model.embedding_model.layers]
    settle_neurons(model, encoder, texts[50:], max_length=64)
    assert all(
        layer.mlp.down_proj.weight.abs().max() < size / 20
        for layer, size in zip(model.embedding_model.layers, largest, strict=True)
    )
    after = embed(model, encoder, texts[:50])
    assert (before * after).sum(dim=1).min() > MIN_COSINE
    losses = [
        1 - (embed(copy.deepcopy(exact_model).bfloat16(), encoder, texts[:50]) * vectors).sum(dim=1).mean()
        for exact_model, vectors in ((cancelling, before), (model, after))
    ]
    assert losses[1] < losses[0] / 10


def test_a_block_without_cancelling_neurons_is_unchanged(checkpoint, encoder):
    model = load_checkpoint(checkpoint)
    start = copy.deepcopy(model)
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(400)]
    settle_neurons(model, encoder, texts, max_length=64)
    assert not any(layer.mlp.down_proj._forward_pre_hooks for layer in model.embedding_model.layers)
    before, after = (embed(checked_model, encoder, texts[:50]) for checked_model in (start, model))
    assert (before * after).sum(dim=1).min() > MIN_COSINE
