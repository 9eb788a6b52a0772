"""Pure functions on tensors; nothing here imports anything but torch."""
