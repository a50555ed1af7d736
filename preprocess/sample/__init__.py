"""Made-up video-text datasets in the layouts of the six real ones; see `preprocess/make_sample_data.py`."""
