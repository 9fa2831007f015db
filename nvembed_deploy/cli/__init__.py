"""The command `nvembed` and its subcommands for embedding."""
