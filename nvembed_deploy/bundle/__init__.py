"""The bundle: the folder that an export writes, described by its manifest and replaced atomically."""
