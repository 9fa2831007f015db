"""Adapters for frameworks that need a class of their own; each needs the framework installed."""
