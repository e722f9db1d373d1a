"""The end of a message about a name that is not known."""

import difflib
from collections.abc import Iterable


def suggestion(key: str, known: Iterable[str], prefix: str = "", what: str = "keys") -> str:
    """The end of a message about an unknown key: the nearest one, and all there are.

    Example:
      >>> suggestion("lr", ["learning_rate", "momentum"], "optimizer.")
      '; did you mean `optimizer.learning_rate`? known keys: learning_rate, momentum'
    """
    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if key == "".join(word[:1] for word in name.split("_"))
    ]
    question = f"; did you mean `{prefix}{nearest[0]}`?" if nearest else "."
    return f"{question} known {what}: {', '.join(known) or 'none'}"
