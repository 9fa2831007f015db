"""File helpers: atomic writes, hashing, and strict parsing of JSON."""
