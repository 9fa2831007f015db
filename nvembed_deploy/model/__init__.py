"""The PyTorch reference. Needs torch; nothing downstream of a bundle imports it."""
