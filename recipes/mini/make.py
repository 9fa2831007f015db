"""How the embedded mini checkpoint was made: its sizes, its data, and the numbers of each step.

Every step keeps what it made in the work folder, so that the same command takes up a killed run where it stopped.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training import blend, corpora, mining, stage
from nvembed_deploy.training.checkpoint_folder import write_checkpoint
from nvembed_deploy.training.examples import Example, read_examples, read_exclusion, write_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import LossWeights, StageOptions
from nvembed_deploy.training.student import read_base
from nvembed_deploy.training.teacher import Teacher
from recipes.mini.cancelling import settle_neurons
from recipes.mini.start import make_base

log = logging.getLogger(__name__)

VOCAB_SIZE, NEURONS = 16_000, 1024
LATENT = LatentAttention(latents=64, heads=4, head_dim=64)

WORD_LISTS = "word_lists"
LISTS, LIST_WORDS = 6_000, (2, 8)
STAGE_1_MIX = {
    "text_wikipedia_en": 40_000,
    "text_wikipedia_en_runs": 16_000,
    "text_wikipedia_en_halves": 2_500,
    "text_wikipedia_en_whole": 3_000,
    "text_books_speeches": 4_000,
    "text_books_speeches_runs": 1_000,
    "wiki_title_intro": 4_000,
    "wordnet": 5_000,
    "wordnet_entries": 10_000,
    "debian_packages": 12_000,
    WORD_LISTS: LISTS,
    "python_docstrings": 2_500,
    "python_topics": 800,
    "covidfaq": 1_400,
    "stackfaq": 1_200,
    "snli": 16_000,
    "clinc150": 8_000,
    "hwu64": 6_000,
    "snips": 2_000,
    "sst2": 5_000,
    "trec_questions": 5_000,
    "rte": 2_700,
}
"""Most examples of a source. Sources of stage two are in it as texts: their labels and pairs are not used yet. Lists of
the teacher's words bring those that our text seldom has."""
STAGE_1 = StageOptions(
    in_batch=True,
    negatives=2,
    temperature=0.05,
    weights=LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0),
    learning_rate=7e-4,
    relative_steps=True,
    weight_decay=0.0,
    warmup_steps=20,
    schedule="cosine",
    max_steps=900,
    batch_rows=192,
    batch_tokens=2304,
    max_length=384,
    held_out=200,
    save_steps=100,
    seed=1,
)

STAGE_2_MIX = {
    "snli": 9_000,
    "rte": 1_200,
    "wiki_title_intro": 1_500,
    "text_wikipedia_en_halves": 400,
    "wordnet": 1_000,
    "python_docstrings": 800,
    "python_topics": 200,
    "covidfaq": 700,
    "stackfaq": 800,
    "text_wikipedia_en": 8_000,
    "text_books_speeches": 1_500,
    "debian_packages": 800,
    WORD_LISTS: 500,
    "clinc150": 1_000,
    "hwu64": 800,
    "snips": 300,
    "sst2": 600,
    "trec_questions": 600,
}
STAGE_2 = StageOptions(
    in_batch=False,
    negatives=2,
    temperature=0.05,
    weights=LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0, centering=1.0, consistency=10.0),
    learning_rate=6e-4,
    relative_steps=True,
    noise=0.02,
    weight_decay=0.0,
    warmup_steps=10,
    schedule="linear",
    max_steps=500,
    batch_rows=192,
    batch_tokens=2304,
    max_length=384,
    held_out=200,
    save_steps=100,
    seed=2,
)
OWN_WORDING = replace(
    STAGE_2,
    weights=replace(STAGE_2.weights, pairs=0.0),
    main_wording=0.7,
    learning_rate=4e-4,
    max_steps=120,
    save_steps=60,
    seed=3,
)
"""Stage two's examples again, most of them with the one wording that their kind of task is usually asked with, and the
teacher alone to follow."""
SETTLING_TEXTS = 2_500
"""See `cancelling.settle_neurons`."""
PAIR_KINDS = (Kind.RETRIEVAL, Kind.TEXT)
OTHER_KINDS = {Kind.RETRIEVAL: 0.4, Kind.SIMILARITY: 0.4}
"""Of stage two's texts without a partner, the shares that are instructed as another kind is."""


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
    examples: str
    """Of which mix."""
    options: StageOptions


MIXES = {"stage-1": STAGE_1_MIX, "stage-2": STAGE_2_MIX}
ROUNDS = (
    Round("stage-1", "stage-1", STAGE_1),
    Round("stage-2", "stage-2", STAGE_2),
    Round("own-wording", "stage-2", OWN_WORDING),
)


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
    start = work / "base"
    if not (start / "config.json").is_file():
        learned = read_examples(_examples_file(work, ROUNDS[0]))[STAGE_1.held_out :]
        texts = [example.query for example in learned]
        found = make_base(start, teacher, texts, vocab_size=VOCAB_SIZE, neurons=NEURONS)
        log.info("base: cosine to the teacher %.3f", found.agreement)
    for item in ROUNDS:
        folder = work / item.name
        checkpoint = folder / "checkpoint"
        examples = read_examples(_examples_file(work, item))
        latent = LATENT if start == work / "base" else None
        if (checkpoint / "config.json").is_file():
            stage.claim(folder, stage.settings_of(start, examples, stage=item.options, teacher=teacher, latent=latent))
        else:
            stage.run_stage(
                start, examples, checkpoint, work=folder, stage=item.options, teacher=teacher, latent=latent
            )
        start = checkpoint
    return _settled(start, out, read_examples(_examples_file(work, ROUNDS[0]))[STAGE_1.held_out :])


def _settled(checkpoint: Path, out: Path, examples: list[Example]) -> Path:
    student = read_base(checkpoint)
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    texts = [example.query for example in examples[:SETTLING_TEXTS]]
    settle_neurons(student.model, encoder, texts, max_length=STAGE_2.max_length)
    return write_checkpoint(
        out,
        student.model,
        config=student.config,
        tokenizer_json=student.tokenizer_json,
        max_length=STAGE_2.max_length,
        card="",
    )


def _examples_file(work: Path, item: Round) -> Path:
    return work / f"examples-{item.examples}.jsonl"


def prepare_examples(work: Path, sources: Sources, teacher: Teacher) -> None:
    """Selects each round's examples and mines their hard negatives, where the work folder lacks them."""
    first = {item.examples: item for item in reversed(ROUNDS)}  # of each mix
    missing = [item for item in first.values() if not _examples_file(work, item).is_file()]
    if not missing:
        return
    examples = list(corpora.read_data(sources.data, wordnet=sources.wordnet, packages=sources.packages))
    examples += word_lists(teacher, seed=STAGE_1.seed)
    excluded = read_exclusion(sources.exclude) if sources.exclude is not None else None
    for item in missing:
        chosen = blend.select(examples, mix=MIXES[item.examples], seed=item.options.seed)
        if excluded is not None:
            bar = tqdm(chosen, desc="leaving out evaluation texts", unit="example", disable=None)
            chosen = list(excluded.keep(bar))
        if item.options.in_batch:
            chosen = [_text_only(example) if example.kind not in PAIR_KINDS else example for example in chosen]
        else:
            chosen = _of_other_kinds(chosen, seed=item.options.seed)
        paired = [example for example in chosen if example.positive]
        table = blend.text_table(paired)
        vectors = teacher.embed(list(table), description=f"teacher, {item.examples}")
        chosen = mining.mine(chosen, vectors, table)
        write_examples(_examples_file(work, item), chosen)
        log.info("%s: %d examples", item.examples, len(chosen))


def word_lists(teacher: Teacher, *, seed: int) -> list[Example]:
    """Texts of a few words each, drawn from the teacher's vocabulary."""
    rng = random.Random(seed)
    words = _words(teacher)
    lists = (" ".join(rng.sample(words, rng.randint(*LIST_WORDS))) for _ in range(LISTS))
    return [Example(query=text, kind=Kind.TEXT, source=WORD_LISTS) for text in lists]


def _text_only(example: Example) -> Example:
    return replace(example, positive="", negatives=(), label="")


def _of_other_kinds(examples: list[Example], *, seed: int) -> list[Example]:
    """Some texts on their own become questions, or something to compare, so that an instruction goes with any text."""
    rng = random.Random(seed)
    kinds = [*OTHER_KINDS, Kind.TEXT]
    shares = [*OTHER_KINDS.values(), 1 - sum(OTHER_KINDS.values())]
    return [
        replace(example, kind=rng.choices(kinds, shares)[0]) if example.kind is Kind.TEXT else example
        for example in examples
    ]


def _words(teacher: Teacher) -> list[str]:
    """The teacher's whole words and numbers, by their ids: in a WordPiece vocabulary from frequent to rare."""
    vocabulary = teacher.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in words if word.isascii() and word.isalnum() and len(word) > 1]
