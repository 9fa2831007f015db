"""A model of a few thousand weights, short examples, and a teacher without weights."""

import random
from dataclasses import replace
from pathlib import Path

import torch

from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import STAGE_1, StageOptions
from tests.tiny import make_tokenizer

LATENT = LatentAttention(latents=4, heads=2, head_dim=8)
DIM = 16
TINY = replace(
    STAGE_1,
    negatives=2,
    learning_rate=5e-3,
    schedule="constant_with_warmup",
    warmup_steps=3,
    batch_queries=6,
    max_length=64,
    save_steps=4,
    log_steps=1,
    bf16=False,
)
WORDS = ("the", "water", "question", "over", "passage", "in", "and", "a long phrase of words")


def sizes() -> dict:
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "hidden_size": DIM,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": make_tokenizer().get_vocab_size(),
    }


def make_base(folder: Path) -> Path:
    """Writes a Mistral model with random weights in the layout that `nvembed train stage --base` reads."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    MistralForCausalLM(MistralConfig(**sizes())).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(make_tokenizer().to_str())
    return folder


def some_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))


def some_examples(count: int = 60, *, seed: int = 0) -> list[Example]:
    """Returns examples of each kind in turn; each query starts with its index."""
    rng = random.Random(seed)
    examples = []
    for index in range(count):
        kind = list(Kind)[index % len(Kind)]
        paired = kind in (Kind.RETRIEVAL, Kind.SIMILARITY)
        examples.append(
            Example(
                query=f"{index} {some_text(rng)}",
                positive=f"{index} answer {some_text(rng)}" if paired else "",
                negatives=tuple(f"{index} wrong {some_text(rng)}" for _ in range(3)) if paired else (),
                kind=kind,
                source=f"set{index % 3}" if paired else f"{kind.value}s",
                label=str(index // 4 % 3) if kind is Kind.LABEL else "",
            )
        )
    return examples


class TinyTeacher:
    """Replacement for `Teacher`: each word is a token whose vector is determined by its letters."""

    dim = DIM
    name = "tiny"

    def __init__(self) -> None:
        self.model = torch.nn.Identity()
        self.table = torch.nn.functional.normalize(
            torch.randn(997, DIM, generator=torch.Generator().manual_seed(4)), dim=-1
        )

    def tokenize(self, texts):
        rows, spans = [], []
        for text in texts:
            row, marks, position = [], [], 0
            for word in text.split():
                start = text.index(word, position)
                position = start + len(word)
                row.append(1 + sum(map(ord, word)) % 996)
                marks.append((start, position))
            rows.append(row)
            spans.append(marks)
        padded_length = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (padded_length - len(row)) for row in rows])
        return torch.tensor([row + [0] * (padded_length - len(row)) for row in rows]), mask, spans

    def forward(self, input_ids, attention_mask):
        states = self.table[input_ids]
        pooled = (states * attention_mask[..., None]).sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1), states

    def embed(self, texts, *, description: str = ""):
        ids, mask, _ = self.tokenize(list(texts))
        return self.forward(ids, mask)[0].to(torch.bfloat16)

    def encode(self, texts, *, is_query: bool):
        return self.embed(texts).float()


def equal(state: dict, other_state: dict) -> bool:
    return state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def check_resumed_run(folder: Path, base: Path, options: StageOptions, recipe=None) -> None:
    """Checks that a run that stops at step 7 and is resumed has the weights of one that does not, and learns."""
    from nvembed_deploy.training import loop, stage
    from nvembed_deploy.training.student import read_base

    def run(name: str, stage_options: StageOptions) -> tuple[dict, list[float]]:
        torch.manual_seed(99 if stage_options.max_steps > 0 else 7)  # what is outside the run's seed must not matter
        student = read_base(base, latent=LATENT, seed=3)
        history = stage.train_student(student, some_examples(), work=folder / name, stage=stage_options, recipe=recipe)
        return student.model.state_dict(), [step["loss"] for step in history if "loss" in step]

    weights, losses = run("whole", options)
    run("cut", replace(options, max_steps=7))
    assert loop.last_checkpoint(folder / "cut" / "training").name in ("checkpoint-4", "checkpoint-7")
    resumed_weights, resumed_losses = run("cut", options)
    assert resumed_losses == losses
    assert equal(weights, resumed_weights)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
