"""Pretrain CLIPS vision towers (arXiv 2411.16828)."""
