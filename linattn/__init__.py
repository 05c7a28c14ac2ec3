"""linattn: attention that is a kernel over its inputs."""

from __future__ import annotations

from linattn._source_tree import search_path

__version__ = "0.1.0"
__path__ = search_path(__path__)
