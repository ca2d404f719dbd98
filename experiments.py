"""The command line: `python experiments.py --help` (see auto_circuit/experiments.py)."""

import sys

from auto_circuit import experiments

if __name__ == "__main__":
    experiments.main()
else:  # `import experiments` is the same module, not a copy of its names.
    sys.modules[__name__] = experiments
