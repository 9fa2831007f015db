"""Makes the embedded mini checkpoint: its sizes, its data, and the options of each step.

Every step stores its output in the work folder, so that the same command resumes an interrupted run.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from nvembed_deploy.model.config import LatentAttention
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.training import blend, mining, stage
from nvembed_deploy.training.checkpoint_folder import write_checkpoint
from nvembed_deploy.training.examples import Example, read_examples, read_exclusion, write_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.student import read_base
from recipes.mini import corpora
from recipes.mini.cancelling import settle_neurons
from recipes.mini.options import LossWeights, MiniOptions
from recipes.mini.recipe import MiniRecipe
from recipes.mini.start import make_base
from recipes.mini.teacher import Teacher

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
"""Maximum number of examples of each source. Sources of stage two are included as texts; their labels and pairs are not
used yet. Lists of the teacher's words add words that are rare in the texts."""
STAGE_1 = MiniOptions(
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
    queries_compete=True,
    chunk_tokens=1 << 20,
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
STAGE_2 = MiniOptions(
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
    queries_compete=True,
    chunk_tokens=1 << 20,
    max_length=384,
    held_out=200,
    save_steps=100,
    seed=2,
)
USUAL_WORDING = replace(
    STAGE_2,
    weights=replace(STAGE_2.weights, pairs=0.0),
    learning_rate=4e-4,
    max_steps=120,
    save_steps=60,
    seed=3,
)
"""Stage two's examples again, most of them with the usual wording of their kind of task, and with the teacher's losses
alone."""
SETTLING_TEXTS = 2_500
"""Number of texts for `cancelling.settle_neurons`."""
PAIR_KINDS = (Kind.RETRIEVAL, Kind.TEXT)
OTHER_KINDS = {Kind.RETRIEVAL: 0.4, Kind.SIMILARITY: 0.4}
"""Fractions of stage two's single texts that are instructed as another kind."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Sources of the mini's data."""

    data: Path
    """Folder of data sets; see `corpora.read_data`, likewise for `wordnet` and `packages`."""
    exclude: Path | None
    """Folder of evaluation sets whose texts and near-duplicates are left out."""
    wordnet: Path | None
    packages: Path | None
    teacher: str | None
    """Folder of the teacher; None for the default of `Teacher`."""


@dataclass(frozen=True)
class Round:
    """One round of training, which starts from the checkpoint of the previous round."""

    name: str
    mix: str
    """Key of `MIXES`."""
    options: MiniOptions
    main_wording: float = 0.0
    """See `recipe.MiniRecipe`."""


BATCH_ROWS, BATCH_TOKENS = 192, 2304
MIXES = {"stage-1": STAGE_1_MIX, "stage-2": STAGE_2_MIX}
ROUNDS = (
    Round("stage-1", "stage-1", STAGE_1),
    Round("stage-2", "stage-2", STAGE_2),
    Round("own-wording", "stage-2", USUAL_WORDING, main_wording=0.7),
)


def make(out: Path, *, work: Path, sources: Sources) -> Path:
    """Runs every step whose output is not in the work folder yet.

    Args:
        out: Checkpoint folder to create or replace; its README.md is kept.
        work: Folder for the output of each step.
        sources: The data, and the texts to exclude from it.

    Returns:
        `out`.

    Raises:
        MissingExtra: The teacher is not installed.
        ConfigError: An option does not fit.
    """
    stage.claim_work_folder(work, {name: str(value) for name, value in vars(sources).items()})
    teacher = Teacher(sources.teacher)
    prepare_examples(work, sources, teacher)
    start = work / "base"
    if not (start / "config.json").is_file():
        texts = [example.query for example in _first_examples(work)]
        base = make_base(start, teacher, texts, vocab_size=VOCAB_SIZE, neurons=NEURONS)
        log.info("base: cosine to the teacher %.3f", base.agreement)
    for round_ in ROUNDS:
        folder = work / round_.name
        checkpoint = folder / "checkpoint"
        examples = read_examples(_examples_file(work, round_))
        latent = LATENT if start == work / "base" else None
        recipe = MiniRecipe(teacher, max_rows=BATCH_ROWS, max_tokens=BATCH_TOKENS, main_wording=round_.main_wording)
        if (checkpoint / "config.json").is_file():
            settings = stage.stage_settings(start, examples, stage=round_.options, latent=latent, recipe=recipe)
            stage.claim_work_folder(folder, settings)
        else:
            stage.run_stage(
                start,
                examples,
                checkpoint,
                work=folder,
                stage=round_.options,
                latent=latent,
                recipe=recipe,
            )
        start = checkpoint
    return _settled(start, out, _first_examples(work))


def _first_examples(work: Path) -> list[Example]:
    """Returns the examples that stage one trains on."""
    examples = read_examples(_examples_file(work, ROUNDS[0]))
    return blend.hold_out(examples, STAGE_1.held_out, seed=STAGE_1.seed)[1]


def _settled(checkpoint: Path, out: Path, examples: list[Example]) -> Path:
    student = read_base(checkpoint)
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
    texts = [example.query for example in examples[:SETTLING_TEXTS]]
    settle_neurons(student.model, encoder, texts, max_length=STAGE_2.max_length)
    return write_checkpoint(
        out,
        student.model.state_dict(),
        config=student.config,
        tokenizer_json=student.tokenizer_json,
        max_length=STAGE_2.max_length,
        card="",
    )


def _examples_file(work: Path, round_: Round) -> Path:
    return work / f"examples-{round_.mix}.jsonl"


def prepare_examples(work: Path, sources: Sources, teacher: Teacher) -> None:
    """Selects the examples of each mix that is not in the work folder yet, and mines their hard negatives."""
    first_rounds = {round_.mix: round_ for round_ in reversed(ROUNDS)}
    missing_rounds = [round_ for round_ in first_rounds.values() if not _examples_file(work, round_).is_file()]
    if not missing_rounds:
        return
    examples = list(corpora.read_data(sources.data, wordnet=sources.wordnet, packages=sources.packages))
    examples += word_lists(teacher, seed=STAGE_1.seed)
    exclusion = read_exclusion(sources.exclude) if sources.exclude is not None else None
    for round_ in missing_rounds:
        selected = blend.select(examples, mix=MIXES[round_.mix], seed=round_.options.seed)
        if exclusion is not None:
            progress_bar = tqdm(selected, desc="excluding evaluation texts", unit="example", disable=None)
            selected = list(exclusion.filter(progress_bar))
        if round_.options.in_batch:
            selected = [_text_only(example) if example.kind not in PAIR_KINDS else example for example in selected]
        else:
            selected = _change_kinds(selected, seed=round_.options.seed)
        selected, report = mining.mine(selected, teacher)
        log.info("%s", report)
        write_examples(_examples_file(work, round_), selected)
        log.info("%s: %d examples", round_.mix, len(selected))


def word_lists(teacher: Teacher, *, seed: int) -> list[Example]:
    """Returns texts of a few words each, drawn from the teacher's vocabulary."""
    rng = random.Random(seed)
    words = _words(teacher)
    lists = (" ".join(rng.sample(words, rng.randint(*LIST_WORDS))) for _ in range(LISTS))
    return [Example(query=text, kind=Kind.TEXT, source=WORD_LISTS) for text in lists]


def _text_only(example: Example) -> Example:
    return replace(example, positive="", negatives=(), label="")


def _change_kinds(examples: list[Example], *, seed: int) -> list[Example]:
    """Changes the kind of some single texts to a question or a comparison, so that any text can have an instruction."""
    rng = random.Random(seed)
    kinds = [*OTHER_KINDS, Kind.TEXT]
    fractions = [*OTHER_KINDS.values(), 1 - sum(OTHER_KINDS.values())]
    return [
        replace(example, kind=rng.choices(kinds, fractions)[0]) if example.kind is Kind.TEXT else example
        for example in examples
    ]


def _words(teacher: Teacher) -> list[str]:
    """Returns the teacher's whole words and numbers by id, in a WordPiece vocabulary from frequent to rare."""
    vocabulary = teacher.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in words if word.isascii() and word.isalnum() and len(word) > 1]
