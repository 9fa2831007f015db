"""The command `nvembed`."""
