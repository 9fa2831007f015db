"""What other vendors' clients send to an embeddings server: one module per vendor."""
