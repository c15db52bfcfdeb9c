"""A reproducible study of visual question answering: teacher, student, scale, size."""

import os
import warnings

# tqdm, which a library imports, asks for a widget package; progress here is plain text.
warnings.filterwarnings("ignore", message="IProgress not found")

if "RANK" in os.environ:  # a rank spends seconds on imports, and its torchrun may be killed meanwhile
    from vqa.orphans import die_with_parent

    die_with_parent()
