"""The search demo: a page over a bundle. Knows `nvembed_deploy.Encoder` and no model code. Needs the extra `app`."""
