"""A reproducible study of visual question answering: teacher, student, scale, size."""

import logging
import warnings

# tqdm, which a library imports, asks for a widget package; progress here is plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

# transformers imports torchao wherever it is installed, and torchao calls what this PyTorch deprecates.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
