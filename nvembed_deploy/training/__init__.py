"""The two-stage contrastive recipe. Needs the extra `train`."""
