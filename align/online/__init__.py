"""What algorithms share that learn from their own samples: GRPO, DiffusionNFT and online DPO."""
