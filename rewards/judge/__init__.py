"""The reward `vlm_judge`: marks from a vision-language model at an OpenAI-compatible endpoint."""
