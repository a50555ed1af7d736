"""The name under which older commands evaluate: ``main_task_retrieval.py --do_eval``."""

import sys
from collections.abc import Sequence

from main_task_retrieval import main as run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; the flags are those of ``main_task_retrieval.py``, without --do_train."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = {token.split("=")[0] for token in argv}
    if "--do_train" in given:
        print("error: inference.py only evaluates; give --do_train to main_task_retrieval.py", file=sys.stderr)
        return 2
    return run(argv if "--do_eval" in given else ["--do_eval", *argv])


if __name__ == "__main__":
    sys.exit(main())
