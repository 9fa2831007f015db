"""How the embedded mini checkpoint was made: its sizes, its data, and the numbers of each step.

Every step keeps what it made in the work folder, so that the same command takes up a killed run where it stopped.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from nvembed_deploy.architecture import LatentAttention
from nvembed_deploy.training import base, blend, corpora, loop, mining, stage
from nvembed_deploy.training.examples import Example, read_examples, read_exclusion, write_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import LossWeights, StageOptions
from nvembed_deploy.training.teacher import Teacher
from nvembed_deploy.training.tokenizer import token_strings, train_tokenizer

log = logging.getLogger(__name__)
_WORD = re.compile(r"[^\W\d_]{2,}|(?<!\d)\d{2,4}(?!\d)")
"""Words, and numbers up to years."""

NAME = "nv-embed-mini"
FEWEST_OF_A_WORD = 2
LEARNED_TOKENS = 4_500
"""Control tokens, bytes, and what BPE learns to spell rare words with."""
VOCAB_SIZE = 28_800
"""The others are whole words: those of the teacher's vocabulary, then the most frequent ones of the text."""
SIZES: dict[str, Any] = {
    "_name_or_path": NAME,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "mistral",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
}
LATENT = LatentAttention(latents=64, heads=4, head_dim=64)

BASE_TOKENS = 400_000
BASE = StageOptions(
    in_batch=False,
    learning_rate=6e-4,
    weight_decay=0.01,
    warmup_steps=15,
    schedule="cosine",
    batch_tokens=4096,
    max_length=256,
    save_steps=100,
    seed=1,
)

WORD_LISTS = "word_lists"
LISTS, LIST_WORDS = 20_000, (2, 8)
STAGE_1_MIX = {
    "text_wikipedia_en": 75_000,
    "text_wikipedia_en_runs": 22_000,
    "text_wikipedia_en_halves": 6_000,
    "text_wikipedia_en_whole": 4_000,
    "text_books_speeches": 9_000,
    "text_books_speeches_runs": 2_000,
    "wiki_title_intro": 9_000,
    "wordnet": 9_000,
    "wordnet_entries": 25_000,
    "debian_packages": 25_000,
    WORD_LISTS: LISTS,
    "python_docstrings": 5_000,
    "python_topics": 800,
    "covidfaq": 1_400,
    "stackfaq": 1_200,
    "snli": 40_000,
    "clinc150": 14_000,
    "hwu64": 9_000,
    "snips": 5_000,
    "sst2": 9_000,
    "trec_questions": 6_000,
    "rte": 2_700,
}
"""Most examples of a source. Sources of stage two are in it as texts: their labels and pairs are not used yet. Lists of
the teacher's words bring those that our text seldom has."""
STAGE_1 = StageOptions(
    in_batch=True,
    negatives=2,
    temperature=0.05,
    weights=LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0),
    learning_rate=1e-3,
    muon_learning_rate=2e-3,
    weight_decay=0.01,
    warmup_steps=60,
    schedule="cosine",
    max_steps=2600,
    epochs=2,
    batch_rows=192,
    batch_tokens=4608,
    max_length=384,
    held_out=400,
    save_steps=200,
    seed=1,
)

STAGE_2_MIX = {
    "wiki_title_intro": 5_000,
    "text_wikipedia_en": 4_000,
    "text_wikipedia_en_halves": 3_000,
    "debian_packages": 2_000,
    WORD_LISTS: 2_000,
    "wordnet": 3_000,
    "python_docstrings": 3_000,
    "python_topics": 300,
    "covidfaq": 1_000,
    "stackfaq": 1_200,
    "snli": 12_000,
    "rte": 1_200,
    "clinc150": 4_000,
    "hwu64": 3_000,
    "snips": 800,
    "sst2": 2_500,
    "trec_questions": 2_500,
}
STAGE_2 = StageOptions(
    in_batch=False,
    negatives=2,
    temperature=0.05,
    weights=LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0, partners=1.0),
    learning_rate=3e-4,
    muon_learning_rate=6e-4,
    weight_decay=0.01,
    warmup_steps=20,
    schedule="linear",
    max_steps=400,
    batch_rows=192,
    batch_tokens=4608,
    max_length=384,
    held_out=200,
    save_steps=100,
    seed=2,
)
PAIR_KINDS = (Kind.RETRIEVAL, Kind.TEXT)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the mini's data come from."""

    data: Path
    """Folder of data sets; see `corpora.read_data`."""
    exclude: Path | None
    """Folder of evaluation sets whose texts and near-duplicates are left out."""
    wordnet: Path | None
    packages: Path | None
    teacher: str | None
    """See `Teacher`."""


@dataclass(frozen=True)
class Round:
    """One training of the same model, from where the round before ended."""

    name: str
    mix: dict[str, int]
    options: StageOptions


ROUNDS = (Round("stage-1", STAGE_1_MIX, STAGE_1), Round("stage-2", STAGE_2_MIX, STAGE_2))


def make(out: Path, *, work: Path, sources: Sources) -> Path:
    """Runs every step that the work folder does not hold yet.

    Args:
        out: Checkpoint folder to make or to replace; its README.md stays.
        work: What each step keeps.
        sources: The data, and what to leave out of it.

    Returns:
        `out`.

    Raises:
        MissingExtra: The teacher is not installed.
        ConfigError: An option does not fit.
    """
    stage.claim(work, {name: str(value) for name, value in vars(sources).items()})
    teacher = Teacher(sources.teacher)
    prepare_examples(work, sources, teacher)
    tokenizer_json = _tokenizer(work, sources, teacher)
    _base(work, sources, tokenizer_json, teacher)
    start = work / "base"
    for item in ROUNDS:
        folder = work / item.name
        checkpoint = out if item is ROUNDS[-1] else folder / "checkpoint"
        if item is ROUNDS[-1] or not (checkpoint / "config.json").is_file():
            stage.run_stage(
                start,
                read_examples(_examples_file(work, item)),
                checkpoint,
                work=folder,
                stage=item.options,
                teacher=teacher,
                latent=LATENT if start == work / "base" else None,
            )
        start = checkpoint
    return out


def _examples_file(work: Path, item: Round) -> Path:
    return work / f"examples-{item.name}.jsonl"


def prepare_examples(work: Path, sources: Sources, teacher: Teacher) -> None:
    """Selects each round's examples and mines their hard negatives, where the work folder lacks them."""
    missing = [item for item in ROUNDS if not _examples_file(work, item).is_file()]
    if not missing:
        return
    examples = list(corpora.read_data(sources.data, wordnet=sources.wordnet, packages=sources.packages))
    examples += word_lists(teacher, seed=STAGE_1.seed)
    excluded = read_exclusion(sources.exclude) if sources.exclude is not None else None
    for item in missing:
        chosen = blend.select(examples, mix=item.mix, seed=item.options.seed)
        if excluded is not None:
            bar = tqdm(chosen, desc="leaving out evaluation texts", unit="example", disable=None)
            chosen = list(excluded.keep(bar))
        if item.options.in_batch:
            chosen = [_text_only(example) if example.kind not in PAIR_KINDS else example for example in chosen]
        paired = [example for example in chosen if example.positive]
        table = blend.text_table(paired)
        vectors = teacher.embed(list(table), description=f"teacher, {item.name}")
        chosen = mining.mine(chosen, vectors, table)
        write_examples(_examples_file(work, item), chosen)
        log.info("%s: %d examples", item.name, len(chosen))


def word_lists(teacher: Teacher, *, seed: int) -> list[Example]:
    """Texts of a few words each, drawn from the teacher's vocabulary."""
    rng = random.Random(seed)
    words = _vocabulary(teacher)
    lists = (" ".join(rng.sample(words, rng.randint(*LIST_WORDS))) for _ in range(LISTS))
    return [Example(query=text, kind=Kind.TEXT, source=WORD_LISTS) for text in lists]


def _text_only(example: Example) -> Example:
    return Example(query=example.query, kind=Kind.TEXT, source=example.source)


def whole_words(teacher: Teacher, counts: Mapping[str, int]) -> list[str]:
    """The words that may be entries of the vocabulary: the teacher's that our text has, then others, by count."""
    known = [word for word in _vocabulary(teacher) if counts.get(word, 0) >= FEWEST_OF_A_WORD]
    others = counts.keys() - set(known)
    return known + sorted(others, key=lambda word: (-counts[word], word))


def _vocabulary(teacher: Teacher) -> list[str]:
    """The teacher's whole words and numbers, by their ids: in a WordPiece vocabulary from frequent to rare."""
    vocabulary = teacher.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in words if word.isascii() and word.isalnum() and len(word) > 1]


def _tokenizer(work: Path, sources: Sources, teacher: Teacher) -> str:
    path = work / "tokenizer.json"
    if not path.is_file():
        log.info("tokenizer: learning %d tokens", VOCAB_SIZE)
        texts = list(corpora.tokenizer_text(sources.data, wordnet=sources.wordnet, packages=sources.packages))
        counts = Counter(chain.from_iterable(_WORD.findall(text.lower()) for text in texts))
        words = whole_words(teacher, counts)
        whole = set(words[: VOCAB_SIZE - LEARNED_TOKENS])
        # Merges are for what is no entry: they are learned from what is left of the text.
        rest = (_WORD.sub(lambda found: "" if found[0] in whole else found[0], text.lower()) for text in texts)
        content = train_tokenizer(rest, vocab_size=VOCAB_SIZE, learned=LEARNED_TOKENS, words=words)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(content.to_str(), encoding="utf-8")
        temporary.replace(path)
    return path.read_text(encoding="utf-8")


def _base(work: Path, sources: Sources, tokenizer_json: str, teacher: Teacher) -> None:
    if (work / "base" / "config.json").is_file():
        return
    strings = token_strings(Tokenizer.from_str(tokenizer_json))
    vectors = teacher.embed(strings, description="teacher, token strings")
    history = base.pretrain(
        work / "base",
        corpora.plain_text(sources.data, seed=BASE.seed),
        config=SIZES,
        tokenizer_json=tokenizer_json,
        folder=work / "base-training",
        options=BASE,
        tokens=BASE_TOKENS,
        token_vectors=base.token_start(vectors, strings),
    )
    if loop.is_main_process():
        stage.write_history(work / "base-training", history)
