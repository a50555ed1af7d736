"""Made-up video-text datasets in the layouts of the six real ones, and a tiny CLIP; see `__main__.py`."""
