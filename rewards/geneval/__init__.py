"""The reward `geneval`: GenEval's rules with a segmentation model of transformers."""
