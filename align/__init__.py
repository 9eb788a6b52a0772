"""Post-training for flow-matching image models: GRPO on Qwen-Image and models like it.

Floors, each importing only from below: ``flow``, ``losses``, ``advantages`` (the maths) < ``models`` <
``rollout``, ``trainer`` < ``grpo``. Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
