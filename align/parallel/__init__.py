"""Sharding a model: ZeRO, resharding, memory sums."""
