"""Recipes of the models in this repository. Not part of the library."""
