"""Post-training for flow-matching image models: SFT, DPO, GRPO and DiffusionNFT on Qwen-Image and models like it.

Rooms, each importing from the floors below it: doors (the files here) > ``cli`` > ``online`` | ``offline`` > ``engine`` >
``sampling`` > ``models`` > ``tiny`` | ``maths`` | ``parallel``. Importing this package loads nothing heavy.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.3.0"

for _package in ("rewards", "preference_data"):
    _found = find_spec(_package)
    if _found is None or _found.origin is None:
        continue
    if Path(_found.origin).resolve() != Path(__file__).resolve().parents[1] / _package / "__init__.py":
        raise ImportError(  # a file or a folder of the same name, most often in the working folder
            f"{_found.origin} hides the package {_package!r} of flow-align: rename it, or start from another folder"
        )
