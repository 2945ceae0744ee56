"""HTML files: the interactive page of a run and the report of a sweep."""
