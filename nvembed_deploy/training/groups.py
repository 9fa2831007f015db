"""The rows of an example, as the model sees them: instructions, negatives, and texts of a class.

Everything is determined by the seed, the epoch and the example's number, so that a resumed run sees the same rows and
any process can make any of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import SYMMETRIC, Kind, instruction_for


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text with its prompt, as the model sees it."""

    text: str
    prompt: str = ""
    """Prefix that is attended to and not pooled; empty without an instruction."""
    question: bool = False
    """True for an instructed query of kind `retrieval`, which looks for an answer."""


Group = tuple[Row, ...]
"""The rows of one example: a single text; or a query, its positive, and its negatives."""
Instruct = Callable[[Example, random.Random], str]
"""Chooses an example's instruction for one epoch; empty for none."""


def instruct(share: float = 1.0) -> Instruct:
    """Returns the recipe's choice: the example's own instruction, or else that of its set or kind.

    Args:
        share: Fraction of the examples that are instructed; the paper instructs all.
    """

    def choose(example: Example, rng: random.Random) -> str:
        if share < 1.0 and rng.random() >= share:
            return ""
        return example.instruction or instruction_for(example.source, example.kind)

    return choose


class Groups:
    """Makes the rows of each example, with an epoch's choice of instruction, negatives, and texts of a class.

    Args:
        examples: In any order.
        template: The model's prompt with the placeholder `{instruction}`.
        negatives: Maximum number of negatives of a query.
        seed: Seed of all choices.
        choose: Chooses the instruction of an example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        template: str,
        negatives: int,
        seed: int,
        choose: Instruct | None = None,
    ) -> None:
        self.examples = examples
        self._template = template
        self._negatives = negatives
        self._seed = seed
        self._choose = choose or instruct()
        self._classes = _classes(examples)

    def group(self, index: int, epoch: int) -> Group:
        """Returns the rows of one example."""
        example = self.examples[index]
        rng = random.Random(f"{self._seed} {epoch} {index}")
        positive, wrong_texts = example.positive, list(example.negatives)
        if example.kind is Kind.LABEL and not positive:
            labels = self._classes.get(example.source, {})
            positive, wrong_texts = _class_pair(example, labels, self._negatives, rng)
        instruction = self._choose(example, rng)
        prompt = self._template.format(instruction=instruction) if instruction else ""
        document_prompt = prompt if example.kind in SYMMETRIC else ""
        rng.shuffle(wrong_texts)
        texts = [text for text in (positive, *wrong_texts[: self._negatives]) if text]
        question = bool(prompt) and example.kind is Kind.RETRIEVAL
        query = Row(text=example.query, prompt=prompt, question=question)
        return (query, *(Row(text=text, prompt=document_prompt) for text in texts))


def _classes(examples: Iterable[Example]) -> dict[str, dict[str, list[str]]]:
    """Returns the distinct texts by source and label."""
    texts_by_class: dict[str, dict[str, dict[str, None]]] = {}
    for example in examples:
        if example.kind is Kind.LABEL and example.label:
            texts_by_class.setdefault(example.source, {}).setdefault(example.label, {})[example.query] = None
    return {
        source: {label: list(texts) for label, texts in classes.items()} for source, classes in texts_by_class.items()
    }


def _class_pair(
    example: Example, labels: Mapping[str, Sequence[str]], negatives: int, rng: random.Random
) -> tuple[str, list[str]]:
    """Draws another text of the example's class, and texts of other classes: example-based, as in NV-Embed v2."""
    same_class = labels.get(example.label, ())
    if len(same_class) < 2:
        return "", []
    position = rng.randrange(len(same_class))
    if same_class[position] == example.query:
        position = (position + 1) % len(same_class)
    other_labels = [label for label in labels if label != example.label]
    wrong_texts = [rng.choice(labels[label]) for label in rng.sample(other_labels, min(negatives, len(other_labels)))]
    while other_labels and len(wrong_texts) < negatives:  # fewer classes than negatives: several texts of a class
        wrong_texts.append(rng.choice(labels[rng.choice(other_labels)]))
    return same_class[position], wrong_texts
