"""Marks by a vision-language model at an OpenAI-compatible endpoint."""
