"""The task in words, for each task and each side of it.

Source: NVIDIA's `instructions.json` beside NV-Embed-v2, revision c50d55f, for the tasks it lists; for the others the
prompt that mteb's own metadata carry, which are e5-mistral's, as NV-Embed's are.
"""

from __future__ import annotations

SYMMETRIC_TYPES = frozenset(
    ("STS", "PairClassification", "Classification", "MultilabelClassification", "Clustering", "Summarization")
)
"""Every text of these is a query; retrieval and reranking have documents, which get no instruction."""
QUESTION = "Given a question, retrieve passages that answer the question"
BY_TYPE = {
    "STS": "Retrieve semantically similar text",
    "Summarization": "Given a news summary, retrieve other semantically similar summaries",
}
"""NVIDIA has one for all tasks of these types."""
BOTH_SIDES = frozenset(("QuoraRetrieval",))
"""Retrieval among like texts: NVIDIA instructs the documents as well."""
OFFICIAL = {
    "ClimateFEVER": "Given a claim about climate change, retrieve documents that support or refute the claim",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
    "FEVER": "Given a claim, retrieve documents that support or refute the claim",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
    "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia",
    "NQ": QUESTION,
    "QuoraRetrieval": "Given a question, retrieve questions that are semantically equivalent to the given question",
    "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
    "Touche2020": QUESTION,
    "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
    "NFCorpus": "Given a question, retrieve relevant documents that answer the question",
    "ArguAna": "Given a claim, retrieve documents that support or refute the claim",
    "FiQA2018": "Given a financial question, retrieve relevant passages that answer the query",
}


def instruction_for(name: str, kind: str, *, is_document: bool, own: str) -> str:
    """The instruction of one side of a task; empty for none.

    Args:
        name: The task's name in mteb.
        kind: Its type in mteb, such as `STS`.
        is_document: Whether the texts are documents that queries look for.
        own: What the task's own metadata say.
    """
    if is_document and kind not in SYMMETRIC_TYPES and name not in BOTH_SIDES:
        return ""
    return OFFICIAL.get(name) or BY_TYPE.get(kind) or own
