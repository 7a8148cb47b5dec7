"""What needs transformers and torch is collected where these are: see `make test-transformers`."""

import importlib.util

collect_ignore = (
    [] if importlib.util.find_spec("transformers") else ["make_data.py", "test_transformers.py"]
)
