"""One thread a process: the models are tiny, and two cores are shared with the jobs that the tests start.

No test measures time: Hypothesis' deadline for an example would fail on a busy machine and say nothing of the law.
"""

import os
import signal

import torch
from hypothesis import settings

# A run's uploader runs at nice 19: beside tests at nice 0 that use all cores it would get 1 % of one, and miss its deadlines.
os.nice(19)
# A shell's job in the background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile("lmdist", deadline=None)
settings.load_profile("lmdist")
