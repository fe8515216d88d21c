"""Checkpoints: what is in one (format), loading it strictly (read), which are found and kept (retain), saving (write).

Knows neither the ranks nor when to save.
"""
