"""The environment variables that a worker, and pip, inherit from the run: those named here, so that no secret is."""

import os
import re
from collections.abc import Mapping
from typing import Any

from rewards.redaction import is_secret

#: The user and the system; proxies and certificates; Python, but not where the run's own packages and code are;
#: threads; devices; where models are kept.
_OF_ALL = r"""
    PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TMP|TEMP|XDG_\w+|LD_LIBRARY_PATH|LD_PRELOAD
    |(?:https?|all|no)_proxy|(?:HTTPS?|ALL|NO)_PROXY|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE
    |PYTHON(?!PATH|HOME|STARTUP|USERBASE)\w*
    |(?:OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|TOKENIZERS)_\w+
    |(?:CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|ROCR|HIP|HSA|TORCH|PYTORCH|TRITON)_\w+
    |(?:HF|HUGGINGFACE|TRANSFORMERS|DIFFUSERS)_\w+
"""
#: pip's settings; compilers; git.
_OF_PIP = (
    r"|PIP_\w+|CC|CXX|C(?:XX|PP)?FLAGS|LDFLAGS|MAX_JOBS|(?:CMAKE|CARGO|PKG_CONFIG)_\w+|SSH_AUTH_SOCK|GIT_SSH_COMMAND"
)


def variables_for_worker(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a worker, which sees only this process's GPU if there are several; ``given``: its own."""
    variables = _inherited(_OF_ALL)
    local, visible = os.environ.get("LOCAL_RANK", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else None
    if local.isdigit() and (devices is None or int(local) < len(devices)):
        # Each process of a run uses its own GPU; without this all workers would use the first one.
        variables["CUDA_VISIBLE_DEVICES"] = local if devices is None else devices[int(local)]
    return variables | own_variables(given)


def variables_for_pip(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of pip and of the builds that it starts."""
    return _inherited(_OF_ALL + _OF_PIP) | own_variables(given)


def own_variables(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that an entry gives, as text; one without a value (None) is that of the run."""
    return {name: os.environ[name] if value is None else str(value) for name, value in given.items()}


def _inherited(names: str) -> dict[str, str]:
    known = re.compile(names, re.VERBOSE)
    return {key: value for key, value in os.environ.items() if known.fullmatch(key) and not is_secret(key)}
