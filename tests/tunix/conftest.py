"""What needs Tunix, and so qwix, is collected where these are: see `make test-tunix`."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("qwix") else ["*.py"]
