"""Rewards that read text in pictures."""
