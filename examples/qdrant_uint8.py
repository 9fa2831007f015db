"""Keeps vectors of one byte per dimension in Qdrant: `python examples/qdrant_uint8.py [BUNDLE]`.

Needs `pip install qdrant-client`. In memory here; `QdrantClient(url=...)` for a server, which then stores bytes.
"""

import sys

from qdrant_client import QdrantClient, models

from nvembed_deploy import Encoder

PASSAGES = ["Purring calms the cat.", "Put the egg into simmering water.", "Salt melts the ice on the road."]

encoder = Encoder(sys.argv[1] if len(sys.argv) > 1 else "models/nv-embed-mini")
client = QdrantClient(":memory:")
# uint8 is int8 plus 128: distances stay the same, products do not. All vectors have about the same length, so the
# order by distance is that by cosine.
vectors = models.VectorParams(
    size=encoder.dimension, distance=models.Distance.EUCLID, datatype=models.Datatype.UINT8, on_disk=True
)
client.create_collection("passages", vectors_config=vectors)
rows = encoder.encode_document(PASSAGES, output_dtype="uint8")
client.upload_collection(
    "passages", vectors=rows, payload=[{"text": text} for text in PASSAGES], ids=range(len(PASSAGES))
)

query = encoder.encode_query("how do I boil an egg?", output_dtype="uint8")
for point in client.query_points("passages", query=query.tolist(), limit=2).points:
    print(f"{point.score:.0f}  {point.payload['text']}")
