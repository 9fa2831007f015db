"""Instructions for each task and each side of it.

Source: NVIDIA's `instructions.json` of NV-Embed-v2, revision c50d55f, for the tasks it lists; for the others the
prompts in mteb's metadata, which are those of e5-mistral, as NV-Embed's are. A variant of a set, such as its version
with fewer documents, has the instruction of the set: names are compared by `set_stem`.
"""

from __future__ import annotations

import re

from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

SYMMETRIC_TYPES = frozenset(
    ("STS", "PairClassification", "Classification", "MultilabelClassification", "Clustering", "Summarization")
)
"""Task types in which every text is a query; retrieval and reranking have documents, which get no instruction."""
BY_TYPE = {
    "STS": "Retrieve semantically similar text",
    "Summarization": "Given a news summary, retrieve other semantically similar summaries",
}
"""Instructions that NVIDIA uses for all tasks of a type."""
BOTH_SIDES = frozenset(("quora",))
"""Stems of retrieval sets among similar texts: NVIDIA instructs the documents as well."""
OFFICIAL = {
    "ClimateFEVER": "Given a claim about climate change, retrieve documents that support or refute the claim",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
    "FEVER": "Given a claim, retrieve documents that support or refute the claim",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
    "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia",
    "NQ": DEFAULT_QUERY_INSTRUCTION,
    "QuoraRetrieval": "Given a question, retrieve questions that are semantically equivalent to the given question",
    "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
    "Touche2020": DEFAULT_QUERY_INSTRUCTION,
    "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
    "NFCorpus": "Given a question, retrieve relevant documents that answer the question",
    "ArguAna": "Given a claim, retrieve documents that support or refute the claim",
    "FiQA2018": "Given a financial question, retrieve relevant passages that answer the query",
}
STACKEXCHANGE = "Given a question paragraph at StackExchange, retrieve a question duplicated paragraph"
"""For CQADupstack's parts, which NVIDIA's file does not list; source: prompt files of others for NV-Embed-v2."""
_VARIANT = re.compile(r"(hardnegatives|retrieval|\.v\d+|v\d)$")


def set_stem(name: str) -> str:
    """Returns a data set's name without what marks a variant of it, in lower case.

    `ClimateFEVERHardNegatives`, `NanoClimateFeverRetrieval` and `climate-fever` all have the stem `climatefever`.
    """
    stem = re.sub(r"[-_ ]", "", name).lower().removeprefix("nano")
    while match := _VARIANT.search(stem):
        stem = stem[: match.start()]
    return "cqadupstack" if stem.startswith("cqadupstack") else stem


BY_STEM = {
    **{set_stem(name): instruction for name, instruction in OFFICIAL.items()},
    "cqadupstack": STACKEXCHANGE,
    "fiqa": OFFICIAL["FiQA2018"],
    "naturalquestions": OFFICIAL["NQ"],
}
"""Instruction by the stem of a retrieval set."""


def instruction_for(name: str, kind: str, *, is_document: bool, default: str) -> str:
    """Returns the instruction for one side of a task; empty for none.

    Args:
        name: The task's name in mteb.
        kind: The task's type in mteb, such as `STS`.
        is_document: True if the texts are documents that queries look for.
        default: The prompt in the task's metadata.
    """
    stem = set_stem(name)
    if is_document and kind not in SYMMETRIC_TYPES and stem not in BOTH_SIDES:
        return ""
    return BY_STEM.get(stem) or BY_TYPE.get(kind) or default
