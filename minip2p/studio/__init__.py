"""The studio: the settings of an edit as widgets in a browser."""
