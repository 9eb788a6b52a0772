"""Rollouts with a record, noise by key, scores, and held-out samples."""
