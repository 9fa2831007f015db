"""Developers' commands: documentation, screenshots, and checks of the tests."""
