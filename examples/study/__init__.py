"""The study of real models: its jobs, how they run, and the page and protocol written from them. See `../real.py`."""
