"""Wordings of the instructions in the mini's training: many of them, so that no single one is memorized."""

from __future__ import annotations

from nvembed_deploy.training.instructions import Kind

INSTRUCTED: dict[Kind, float] = {Kind.RETRIEVAL: 0.7, Kind.SIMILARITY: 0.7, Kind.LABEL: 0.3, Kind.TEXT: 0.2}
"""Fraction of the examples whose query gets an instruction."""
WORDINGS: dict[Kind, tuple[str, ...]] = {
    Kind.RETRIEVAL: (
        "Given a question, retrieve passages that answer the question",
        "Given a web search query, retrieve relevant passages that answer the query",
        "Given a question, retrieve Wikipedia passages that answer the question",
        "Given a multi-hop question, retrieve documents that can help answer the question",
        "Given a claim, retrieve documents that support or refute the claim",
        "Given a scientific claim, retrieve documents that support or refute the claim",
        "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
        "Given a financial question, retrieve relevant passages that answer the query",
        "Given a question about a medical topic, retrieve documents that best answer the question",
        "Given a query on a technical topic, retrieve documents that answer the query",
        "Given a word or a term, retrieve its definition",
        "Given a title, retrieve the article that it belongs to",
        "Given the name of an entity, retrieve its description",
        "Given a programming question, retrieve documentation that answers it",
        "Given a short description of a function, retrieve its documentation",
        "Given a user question, retrieve the matching answer from a list of frequently asked questions",
        "Given the beginning of a passage, retrieve its continuation",
        "Find the document that answers this",
        "Search the manual for the part that explains this",
        "Retrieve relevant documents for the query",
        "Represent this query for searching relevant passages",
    ),
    Kind.SIMILARITY: (
        "Retrieve semantically similar text.",
        "Retrieve semantically similar text",
        "Given a sentence, retrieve sentences with the same meaning",
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Find a paraphrase of this text",
        "Given a question paragraph at StackExchange, retrieve a question duplicated paragraph",
        "Compare the meaning of short texts",
    ),
    Kind.LABEL: (
        "Given an online banking query, find the corresponding intents",
        "Given a user utterance as query, find the user intents",
        "Classify the intent of the given utterance",
        "Classify the sentiment expressed in the given movie review text",
        "Classify the emotion expressed in the given message",
        "Classify the kind of answer that the question asks for",
        "Identify the topic or theme of the given text",
        "Identify the category of the given question",
        "Given a command to an assistant, find the scenario that it belongs to",
    ),
    Kind.TEXT: (
        "Retrieve semantically similar text.",
        "Identify the topic or theme of the given text",
        "Identify the topic or theme of the given news articles",
        "Identify the main category of the given abstract based on its title",
        "Represent the text",
        "Summarize the text in one vector",
    ),
}
"""Source of the style and of several wordings: NVIDIA's `instructions.json` and the prompts of the MTEB benchmark."""
