"""A small HTTP server with OpenAI's embeddings interface, on FastAPI and uvicorn. Needs the extra `serve`."""
