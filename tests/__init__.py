"""The tests. Each takes featx from here, so that one line switches what the whole suite runs on."""

import importlib
import os

featx = importlib.import_module(os.environ.get("FEATX", "featx"))
