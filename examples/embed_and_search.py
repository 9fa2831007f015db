"""Embeds passages and finds the best one for a question: `python examples/embed_and_search.py [BUNDLE]`."""

import sys

from nvembed_deploy import Encoder

PASSAGES = [
    "Run git reset --soft HEAD~1: the commit is removed and its changes stay staged.",
    "Dissolved salt lowers the freezing point of water, so ice on the road melts below zero degrees.",
    "Put the egg into simmering water and take it out after six minutes.",
]
QUESTIONS = ["how do I undo my last git commit?", "why is salt spread on roads in winter?"]

# A checkout has a small model. For yours: nvembed export --model DIR --out BUNDLE
with Encoder(sys.argv[1] if len(sys.argv) > 1 else "models/nv-embed-mini") as encoder:
    passages = encoder.encode_document(PASSAGES)  # float32 [3, D], rows of unit length
    questions = encoder.encode_query(QUESTIONS)  # with the model's prompt for queries
    cosines = encoder.similarity(questions, passages)  # [2, 3]
    for question, row in zip(QUESTIONS, cosines, strict=True):
        best = int(row.argmax())
        print(f"{question}\n  {row[best]:.3f}  {PASSAGES[best]}")
