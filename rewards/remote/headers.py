"""Reading HTTP headers."""

import math
import time
from email.utils import parsedate_to_datetime


def retry_after(value: str | None, longest: float) -> float | None:
    """Return the seconds of a Retry-After header, at most ``longest``.

    The header may be a number or a date; None means that it is neither, or missing.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), longest) if math.isfinite(seconds) else None
