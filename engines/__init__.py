"""The life of an engine on its device: build, check, show, measure and pack it.

Installed from a wheel, these modules are in `nvembed_deploy.engines`: their name is too common for a top-level package.
"""
