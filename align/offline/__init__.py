"""What algorithms share that learn from data: SFT and DPO."""
