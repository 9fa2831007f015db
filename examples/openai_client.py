"""Starts the server and calls it with OpenAI's client: `python examples/openai_client.py BUNDLE`.

Needs the extra `serve`, and `pip install openai`.
"""

import socket
import subprocess
import sys

from openai import OpenAI

bundle = sys.argv[1]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

command = [sys.executable, "-m", "nvembed_deploy", "serve", bundle, "--name", "embedder", "--port", str(port)]
with subprocess.Popen(command) as server:
    try:
        # The client repeats a request until the server has loaded the engine.
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        passages = client.embeddings.create(model="embedder", input=["Purring calms the cat.", "Boil the egg."])
        # The same model under its name for queries adds the prompt for queries.
        query = client.embeddings.create(model="embedder-query", input="why do cats purr?")
        for item in passages.data:
            print(sum(a * b for a, b in zip(item.embedding, query.data[0].embedding, strict=True)))
    finally:
        server.terminate()
