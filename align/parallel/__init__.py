"""Sharing a model out: ZeRO, resharding, memory sums."""
