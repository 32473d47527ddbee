"""What every small training of a process would pay for again, done once after the imports.

Trainers collect garbage, which reads all that was ever imported, and in a fork copies it; accelerate reads DeepSpeed's
package metadata whenever a model is unwrapped.
"""

import gc
from functools import cache
from importlib import import_module
from importlib.util import find_spec


def prepare() -> None:
    """To be called when everything is imported."""
    if find_spec("accelerate") is not None:
        imports = import_module("accelerate.utils.imports")
        if not hasattr(imports._is_package_available, "cache_info"):
            imports._is_package_available = cache(imports._is_package_available)
    gc.collect()
    gc.freeze()
