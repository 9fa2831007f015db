"""Searches bits with faiss and int8 vectors with usearch: `python examples/int8_search.py [BUNDLE]`.

Needs `pip install faiss-cpu usearch`. Both indexes compare a query with every vector here; at millions of vectors use
faiss's IndexBinaryIVF, and usearch without `exact`.
"""

import sys

import faiss
import numpy as np
from usearch.index import Index

from nvembed_deploy import Encoder
from nvembed_deploy.vectors import rescore

PASSAGES = [
    "Purring calms the cat, and often the people beside it.",
    "Put the egg into simmering water and take it out after six minutes.",
    "Dissolved salt lowers the freezing point of water, so ice on the road melts below zero degrees.",
    "Run git reset --soft HEAD~1: the commit is removed and its changes stay staged.",
]
QUESTIONS = ["how do I boil an egg?", "why is salt spread on roads in winter?"]

encoder = Encoder(sys.argv[1] if len(sys.argv) > 1 else "models/nv-embed-mini")

# One byte per dimension. The model's own step is the same for every text, so products of int8 are cosines, scaled.
int8 = encoder.encode_document(PASSAGES, output_dtype="int8")
int8_queries = encoder.encode_query(QUESTIONS, output_dtype="int8")
bytes_index = Index(ndim=encoder.dimension, metric="ip", dtype="i8")
bytes_index.add(np.arange(len(PASSAGES)), int8)
for question, keys in zip(QUESTIONS, bytes_index.search(int8_queries, 1, exact=True).keys, strict=True):
    print(f"int8: {question} {PASSAGES[keys[0]]}")

# One bit per dimension, in 1/32 of float32's memory: bits select candidates, and int8 vectors, on disk, rank them.
bits_index = faiss.IndexBinaryFlat(encoder.dimension)
bits_index.add(encoder.encode_document(PASSAGES, output_dtype="ubinary"))
_, candidates = bits_index.search(encoder.encode_query(QUESTIONS, output_dtype="ubinary"), 3)
best, _ = rescore(int8_queries, candidates, int8, top_k=1)
for question, row in zip(QUESTIONS, best, strict=True):
    print(f"bits, then int8: {question} {PASSAGES[row[0]]}")
