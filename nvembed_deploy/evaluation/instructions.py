"""Instructions for each task and each side of it.

Source: NVIDIA's `instructions.json` of NV-Embed-v2, revision c50d55f, for the tasks it lists; for the others the
prompts in mteb's metadata, which are those of e5-mistral, as NV-Embed's are.
"""

from __future__ import annotations

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
BOTH_SIDES = frozenset(("QuoraRetrieval",))
"""Retrieval among similar texts: NVIDIA instructs the documents as well."""
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


def instruction_for(name: str, kind: str, *, is_document: bool, default: str) -> str:
    """Returns the instruction for one side of a task; empty for none.

    Args:
        name: The task's name in mteb.
        kind: The task's type in mteb, such as `STS`.
        is_document: True if the texts are documents that queries look for.
        default: The prompt in the task's metadata.
    """
    if is_document and kind not in SYMMETRIC_TYPES and name not in BOTH_SIDES:
        return ""
    return OFFICIAL.get(name) or BY_TYPE.get(kind) or default
