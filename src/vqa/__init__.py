"""A reproducible study of visual question answering: teacher, student, scale, size."""

import warnings

# tqdm, which a library imports, asks for a widget package; progress here is plain text.
warnings.filterwarnings("ignore", message="IProgress not found")
