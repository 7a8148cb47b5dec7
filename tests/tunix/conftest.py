"""What needs Tunix is collected where it is: see `make test-tunix`."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("tunix") else ["*.py"]
