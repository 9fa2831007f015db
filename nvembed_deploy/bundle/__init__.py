"""The bundle: what an export writes, described by its own manifest and switched in whole."""
