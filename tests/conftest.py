"""One thread a process: the models are tiny, and two cores are shared with the jobs that the tests start."""

import torch

torch.set_num_threads(1)
