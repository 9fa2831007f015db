"""The two-stage contrastive training recipe. Needs the extra `train`."""
