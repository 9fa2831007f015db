"""How the embedded mini checkpoint was made: its sizes, its data, and the numbers of each step.

Every step keeps what it made in the work folder, so that the same command takes up a killed run where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from nvembed_deploy.config import LatentAttention
from nvembed_deploy.training import base, blend, corpora, loop, mining, stage
from nvembed_deploy.training.examples import Example, read_examples, read_exclusion, write_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import LossWeights, StageOptions
from nvembed_deploy.training.teacher import Teacher
from nvembed_deploy.training.tokenizer import token_strings, train_tokenizer

log = logging.getLogger(__name__)

NAME = "nv-embed-mini"
VOCAB_SIZE = 20000
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
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
}
FEWEST_OF_A_WORD, MOST_OF_A_WORD = 120, 1_000_000
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

STAGE_1_MIX = {
    "text_wikipedia_en": 80000,
    "text_wikipedia_en_runs": 24000,
    "text_wikipedia_en_halves": 5000,
    "text_wikipedia_en_whole": 3500,
    "text_books_speeches": 12000,
    "text_books_speeches_runs": 3000,
    "wiki_title_intro": 6000,
    "wordnet": 10000,
    "wordnet_entries": 30000,
    "python_docstrings": 4000,
    "python_topics": 800,
    "covidfaq": 1400,
    "stackfaq": 1200,
    "snli": 9000,
    "clinc150": 8000,
    "hwu64": 5000,
    "snips": 2000,
    "sst2": 4000,
    "trec_questions": 4000,
    "rte": 2500,
}
"""Most examples of a source. Sources of stage two are in it as texts: their labels and pairs are not used yet."""
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
    max_steps=1500,
    batch_rows=160,
    batch_tokens=4608,
    max_length=384,
    held_out=400,
    save_steps=200,
    seed=1,
)

STAGE_2_MIX = {
    "wiki_title_intro": 1500,
    "text_wikipedia_en": 4000,
    "text_wikipedia_en_halves": 1000,
    "wordnet": 2000,
    "python_docstrings": 1000,
    "covidfaq": 500,
    "stackfaq": 600,
    "snli": 3000,
    "rte": 600,
    "clinc150": 3000,
    "hwu64": 2000,
    "snips": 600,
    "sst2": 1500,
    "trec_questions": 1500,
}
STAGE_2 = StageOptions(
    in_batch=False,
    negatives=3,
    temperature=0.05,
    weights=LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0),
    learning_rate=2e-4,
    muon_learning_rate=4e-4,
    weight_decay=0.01,
    warmup_steps=20,
    schedule="linear",
    max_steps=260,
    batch_rows=160,
    batch_tokens=4608,
    max_length=384,
    held_out=200,
    save_steps=100,
    seed=2,
)
PAIR_KINDS = (Kind.RETRIEVAL, Kind.TEXT)


def make(
    data: Path, out: Path, *, work: Path, exclude: Path | None, wordnet: Path | None, teacher_folder: str | None
) -> Path:
    """Runs every step that the work folder does not hold yet.

    Args:
        data: Folder of data sets; see `corpora.read_data`.
        out: Checkpoint folder to make or to replace; its README.md stays.
        work: What each step keeps.
        exclude: Folder of evaluation sets whose texts and near-duplicates are left out.
        wordnet: See `corpora.read_data`.
        teacher_folder: See `Teacher`.

    Returns:
        `out`.

    Raises:
        MissingExtra: The teacher is not installed.
        ConfigError: An option does not fit.
    """
    given = {"data": data, "exclude": exclude, "wordnet": wordnet, "teacher": teacher_folder}
    stage.claim(work, {name: str(value) for name, value in given.items()})
    teacher = Teacher(teacher_folder)
    first, second = work / "examples-1.jsonl", work / "examples-2.jsonl"
    if not (first.is_file() and second.is_file()):
        prepare_examples(data, first, second, exclude=exclude, wordnet=wordnet, teacher=teacher)
    tokenizer_json = _tokenizer(data, work, wordnet, teacher)
    _base(data, work, tokenizer_json, teacher)
    if not (work / "stage-1" / "checkpoint" / "config.json").is_file():
        stage.run_stage(
            work / "base",
            read_examples(first),
            work / "stage-1" / "checkpoint",
            work=work / "stage-1",
            stage=STAGE_1,
            teacher=teacher,
            latent=LATENT,
        )
    return stage.run_stage(
        work / "stage-1" / "checkpoint",
        read_examples(second),
        out,
        work=work / "stage-2",
        stage=STAGE_2,
        teacher=teacher,
    )


def prepare_examples(
    data: Path, first: Path, second: Path, *, exclude: Path | None, wordnet: Path | None, teacher: Teacher
) -> None:
    """Selects each stage's examples and mines their hard negatives."""
    examples = list(corpora.read_data(data, wordnet=wordnet))
    excluded = read_exclusion(exclude) if exclude is not None else None
    for path, mix, seed in ((first, STAGE_1_MIX, STAGE_1.seed), (second, STAGE_2_MIX, STAGE_2.seed)):
        chosen = blend.select(examples, mix=mix, seed=seed)
        if excluded is not None:
            bar = tqdm(chosen, desc="leaving out evaluation texts", unit="example", disable=None)
            chosen = list(excluded.keep(bar))
        if path == first:
            chosen = [_text_only(example) if example.kind not in PAIR_KINDS else example for example in chosen]
        paired = [example for example in chosen if example.positive]
        table = blend.text_table(paired)
        vectors = teacher.embed(list(table), description=f"teacher, {path.stem}")
        chosen = mining.mine(chosen, vectors, table)
        write_examples(path, chosen)
        log.info("%s: %d examples", path, len(chosen))


def _text_only(example: Example) -> Example:
    return Example(query=example.query, kind=Kind.TEXT, source=example.source)


def teacher_words(teacher: Teacher) -> Iterator[str]:
    """The whole words of the teacher's vocabulary, each as often as its rank there lets expect (Zipf's law).

    They make room for words that our text seldom has, such as those of science. For a WordPiece vocabulary, whose ids
    run from frequent to rare.
    """
    vocabulary = teacher.tokenizer.get_vocab()
    words = [word for word in sorted(vocabulary, key=vocabulary.__getitem__) if word.isascii() and word.isalpha()]
    for rank, word in enumerate((word for word in words if len(word) > 1), 1):
        yield " ".join([word] * max(FEWEST_OF_A_WORD, MOST_OF_A_WORD // rank))


def _tokenizer(data: Path, work: Path, wordnet: Path | None, teacher: Teacher) -> str:
    path = work / "tokenizer.json"
    if not path.is_file():
        log.info("tokenizer: learning %d tokens", VOCAB_SIZE)
        texts = chain(corpora.tokenizer_text(data, wordnet=wordnet), teacher_words(teacher))
        content = train_tokenizer(texts, vocab_size=VOCAB_SIZE)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(content.to_str(pretty=True), encoding="utf-8")
        temporary.replace(path)
    return path.read_text(encoding="utf-8")


def _base(data: Path, work: Path, tokenizer_json: str, teacher: Teacher) -> None:
    if (work / "base" / "config.json").is_file():
        return
    strings = token_strings(Tokenizer.from_str(tokenizer_json))
    vectors = teacher.embed(strings, description="teacher, token strings")
    history = base.pretrain(
        work / "base",
        corpora.plain_text(data, seed=BASE.seed),
        config=SIZES,
        tokenizer_json=tokenizer_json,
        folder=work / "base-training",
        options=BASE,
        tokens=BASE_TOKENS,
        token_vectors=base.token_start(vectors, strings),
    )
    if loop.is_main_process():
        stage.write_history(work / "base-training", history)
