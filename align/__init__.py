"""Post-training for flow-matching image models: SFT, DPO, GRPO and DiffusionNFT on Qwen-Image and models like it.

Rooms, each importing from the floors below it: doors (the files here) > ``cli`` > ``online`` | ``offline`` > ``engine`` >
``sampling`` > ``models`` > ``tiny`` | ``maths`` | ``parallel``. Importing this package loads nothing heavy.
"""

__version__ = "0.2.0"
