"""The reward that reads text in images."""
