"""The embedded model: a small Mistral whose layers start from a BERT's, trained with NV-Embed's recipe."""
