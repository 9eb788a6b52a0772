"""Rewards in another process or on another machine."""
