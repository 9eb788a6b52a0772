"""GenEval's rules on a segmenter of transformers."""
