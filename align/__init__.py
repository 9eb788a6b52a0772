"""Post-training for flow-matching image models: SFT, DPO, GRPO and DiffusionNFT on Qwen-Image and models like it.

Rooms, each importing from the floors below it: doors (the files here) > ``cli`` > ``online`` | ``offline`` > ``engine`` >
``sampling`` > ``models`` > ``tiny`` | ``maths`` | ``parallel``. Importing this package loads nothing heavy.
"""

from importlib.util import find_spec

__version__ = "0.3.0"

for _package in ("rewards", "preference_data"):
    _found = find_spec(_package)
    if _found is not None and _found.submodule_search_locations is None:  # a file in the working folder
        raise ImportError(
            f"{_found.origin} hides the package {_package!r} of flow-align: rename the file, or start from another folder"
        )
