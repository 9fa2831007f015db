"""Developers' commands: what the README says is measured and written by these."""
