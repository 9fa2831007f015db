"""Kinds of examples, and the instruction of a data set that brings none of its own."""

from __future__ import annotations

from enum import Enum

from nvembed_deploy.evaluation.instructions import BY_STEM, BY_TYPE, set_stem
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION


class Kind(str, Enum):
    """Kind of an example; decides the sides that are instructed."""

    RETRIEVAL = "retrieval"
    """A question or a title, and the passage that answers it: only the query is instructed."""
    SIMILARITY = "similarity"
    """Two texts that mean the same: both sides are instructed."""
    LABEL = "label"
    """A text that belongs to a class: both sides are instructed."""
    TEXT = "text"
    """A single text, for recipes that distil a teacher; never instructed."""


SYMMETRIC = (Kind.SIMILARITY, Kind.LABEL)
"""Kinds that are instructed on both sides or on neither; documents of the other kinds are never instructed."""
BY_KIND = {
    Kind.RETRIEVAL: DEFAULT_QUERY_INSTRUCTION,
    Kind.SIMILARITY: BY_TYPE["STS"],
    Kind.LABEL: "Identify the category of the given text",
    Kind.TEXT: "",
}
"""Instructions for sets that are not in `BY_SET`; those of retrieval and similarity are NVIDIA's for their kind."""
BY_SET = {
    **BY_STEM,
    "stackexchange": BY_STEM["cqadupstack"],
    "amazoncounterfactual": "Classify a given Amazon customer review text as either counterfactual or"
    " not-counterfactual",
    "amazonpolarity": "Classify Amazon reviews into positive or negative sentiment",
    "amazonreviews": "Classify the given Amazon review into its appropriate rating category",
    "banking77": "Given a online banking query, find the corresponding intents",
    "emotion": "Classify the emotion expressed in the given Twitter message into one of the six emotions: anger,"
    " fear, joy, love, sadness, and surprise",
    "imdb": "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
    "mtopdomain": "Classify the intent domain of the given utterance in task-oriented conversation",
    "mtopintent": "Classify the intent of the given utterance in task-oriented conversation",
    "massiveintent": "Given a user utterance as query, find the user intents",
    "massivescenario": "Given a user utterance as query, find the user scenarios",
    "toxicconversations": "Classify the given comments as either toxic or not toxic",
    "tweetsentimentextraction": "Classify the sentiment of a given tweet as either positive, negative, or neutral",
    "arxivclusteringp2p": "Identify the main and secondary category of Arxiv papers based on the titles and abstracts",
    "arxivclusterings2s": "Identify the main and secondary category of Arxiv papers based on the titles",
    "biorxivclusteringp2p": "Identify the main category of Biorxiv papers based on the titles and abstracts",
    "biorxivclusterings2s": "Identify the main category of Biorxiv papers based on the titles",
    "medrxivclusteringp2p": "Identify the main category of Medrxiv papers based on the titles and abstracts",
    "medrxivclusterings2s": "Identify the main category of Medrxiv papers based on the titles",
    "redditclustering": "Identify the topic or theme of Reddit posts based on the titles",
    "redditclusteringp2p": "Identify the topic or theme of Reddit posts based on the titles and posts",
    "stackexchangeclustering": "Identify the topic or theme of StackExchange posts based on the titles",
    "stackexchangeclusteringp2p": "Identify the topic or theme of StackExchange posts based on the given paragraphs",
    "twentynewsgroups": "Identify the topic or theme of the given news articles",
}
"""Instruction of the paper's sets by stem: NVIDIA's file for retrieval, for classes mteb's prompts, which are those of
e5-mistral. The paper's own table of training instructions was not at hand."""


def instruction_for(source: str, kind: Kind) -> str:
    """Returns the instruction of a set that brings none: the set's by its name, or else its kind's."""
    if kind is Kind.TEXT:
        return ""
    stem = set_stem(source)
    return BY_SET.get(stem) or BY_SET.get(stem.removesuffix("classification")) or BY_KIND[kind]
