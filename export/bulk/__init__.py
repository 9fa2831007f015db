"""Bulk jobs: inputs, shards, the workers that embed them, and their output."""
