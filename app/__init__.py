"""The search page for a bundle. Uses `nvembed_deploy.Encoder` and no model code. Needs the extra `app`."""
